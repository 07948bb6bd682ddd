"""Accelerate's autocast and gradient scaler, for a training step that does not use Accelerate's own."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, cast

import torch
from accelerate import Accelerator
from accelerate.utils.modeling import get_mixed_precision_context_manager
from torch import nn

from runtime.environment import launch_variables_kept
from runtime.errors import ConfigurationError, DivergenceError, Problem

Precision = Literal["fp32", "bf16", "fp16"]

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
_LEAST_LOSS_SCALE = 2.0**-14  # below it the search for a scale with finite gradients cannot succeed


def make_accelerator(precision: Precision, handlers: Sequence[Any]) -> Accelerator:
    """Join the process group and return an Accelerator with this mixed precision. Collective.

    Raises:
        ConfigurationError: this device does not support the precision.
    """
    name = "no" if precision == "fp32" else precision  # explicit, or Accelerate reads the environment
    try:
        with launch_variables_kept():
            accelerator = Accelerator(mixed_precision=name, dynamo_backend="no", kwargs_handlers=list(handlers))
    except ValueError as error:
        if "mixed precision" not in str(error):
            raise
        raise ConfigurationError(
            [Problem("configuration", "precision", f"{precision} is not supported on this device: {error}")]
        ) from error
    if precision == "fp16" and accelerator.device.type == "cpu":
        # Accelerate (1.15) silently computes in float32 on CPUs.
        accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu")
    return accelerator


def forward_context(accelerator: Accelerator) -> AbstractContextManager[None]:
    """Return the context of ``accelerator.autocast()`` for repeated use; it must not be nested in itself.

    Creating it takes Accelerate 20 µs, ten times as long as entering it.
    """
    context = get_mixed_precision_context_manager(accelerator.native_amp, accelerator.autocast_handler)
    return cast(AbstractContextManager[None], context)


def wrapped_module(accelerator: Accelerator, module: nn.Module) -> nn.Module:
    """Return the module as Accelerate wraps it, without Accelerate's wrapper of the forward method. Collective.

    That wrapper converts all outputs to float32: a needless second copy of the logits. Undoing it with ``unwrap_model`` would
    import the zero backend where installed (1.15), which takes over a second.
    """
    native_amp, accelerator.native_amp = accelerator.native_amp, False
    try:
        return cast(nn.Module, accelerator.prepare(module))
    finally:
        accelerator.native_amp = native_amp


def refuse_weights(module: nn.Module, *, scaled: bool, clamped: bool) -> None:
    """Refuse trainable weights whose gradients torch cannot unscale or clamp.

    Args:
        scaled: whether the loss is scaled (fp16): torch cannot unscale float16 or complex gradients.
        clamped: whether ``optimizer.max_grad_value`` is set: complex numbers have no order.

    Raises:
        ConfigurationError: naming a weight.
    """
    for full, parameter in module.named_parameters():
        name = full.removeprefix("model.")
        if not parameter.requires_grad:
            continue
        if scaled and parameter.dtype == torch.float16:
            what = (
                f"fp16 scales the loss, and the gradients of float16 weights ({name}) cannot be unscaled: build the model "
                "in float32 (fp16 still computes in half precision), or use precision: bf16"
            )
            raise ConfigurationError([Problem("configuration", "precision", what)])
        if scaled and parameter.is_complex():
            what = f"fp16 scales the loss, and torch cannot unscale complex gradients ({name}): use bf16 or fp32"
            raise ConfigurationError([Problem("configuration", "precision", what)])
        if clamped and parameter.is_complex():
            what = f"complex gradients ({name}) cannot be clamped to a value: use optimizer.max_grad_norm"
            raise ConfigurationError([Problem("configuration", "optimizer.max_grad_value", what)])


def refuse_lost_scale(scaler: torch.amp.GradScaler) -> None:
    """Fail if the loss scale has fallen too low. Waits for the device, as updating the scale does anyway.

    Raises:
        DivergenceError: no scale gives a finite gradient.
    """
    if scaler.get_scale() < _LEAST_LOSS_SCALE:
        raise DivergenceError(
            "the fp16 loss scale fell below 2^-14 without one finite gradient: the loss itself is infinite or NaN; "
            "lower the learning rate, clip (optimizer.max_grad_norm), or use precision: bf16"
        )
