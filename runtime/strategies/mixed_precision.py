"""Accelerate's mixed precision: its autocast and its gradient scaler, for a step that is not Accelerate's."""

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
_LEAST_LOSS_SCALE = 2.0**-14  # below it no finite gradient can be what the scale is searching for


def make_accelerator(precision: Precision, handlers: Sequence[Any]) -> Accelerator:
    """Join the process group and return the Accelerator that does the mixed precision. Collective.

    Raises:
        ConfigurationError: this device has no such precision.
    """
    name = "no" if precision == "fp32" else precision  # given explicitly: Accelerate would read the environment
    try:
        with launch_variables_kept():
            accelerator = Accelerator(mixed_precision=name, dynamo_backend="no", kwargs_handlers=list(handlers))
    except ValueError as error:
        if "mixed precision" not in str(error):
            raise
        raise ConfigurationError(
            [Problem("configuration", "precision", f"cannot be {precision} here: {error}")]
        ) from error
    if precision == "fp16" and accelerator.device.type == "cpu":
        # Accelerate (1.15) silently computes in float32 there.
        accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu")
    return accelerator


def forward_context(accelerator: Accelerator) -> AbstractContextManager[None]:
    """Return what ``accelerator.autocast()`` enters, to be entered again and again, but not within itself.

    Making it takes Accelerate 20 µs, ten times as long as entering it.
    """
    context = get_mixed_precision_context_manager(accelerator.native_amp, accelerator.autocast_handler)
    return cast(AbstractContextManager[None], context)


def wrapped_module(accelerator: Accelerator, module: nn.Module) -> nn.Module:
    """Return the module as Accelerate wraps it, whose forward method stays as it is. Collective.

    Around the method, Accelerate would convert all that a model returns to float32: a second copy of the logits, for nothing.
    To take that back with ``unwrap_model`` would import the zero backend where it is installed (1.15): over a second.
    """
    native_amp, accelerator.native_amp = accelerator.native_amp, False
    try:
        return cast(nn.Module, accelerator.prepare(module))
    finally:
        accelerator.native_amp = native_amp


def refuse_weights(module: nn.Module, *, scaled: bool, clamped: bool) -> None:
    """Refuse weights with whose gradients torch cannot do what is asked for.

    Args:
        scaled: fp16, whose loss scale cannot be taken out of float16 gradients, nor out of complex ones.
        clamped: ``optimizer.max_grad_value``, and complex numbers have no order.

    Raises:
        ConfigurationError: naming a weight.
    """
    for full, parameter in module.named_parameters():
        name = full.removeprefix("model.")
        if not parameter.requires_grad:
            continue
        if scaled and parameter.dtype == torch.float16:
            what = (
                f"fp16 scales the loss, and the gradients of float16 weights ({name}) cannot be scaled back: build the model "
                "in float32, which fp16 computes with in half precision, or take precision: bf16"
            )
            raise ConfigurationError([Problem("configuration", "precision", what)])
        if scaled and parameter.is_complex():
            what = f"fp16 scales the loss, and torch cannot scale complex gradients ({name}) back: take bf16 or fp32"
            raise ConfigurationError([Problem("configuration", "precision", what)])
        if clamped and parameter.is_complex():
            what = f"complex gradients ({name}) cannot be clamped to a value: take optimizer.max_grad_norm"
            raise ConfigurationError([Problem("configuration", "optimizer.max_grad_value", what)])


def refuse_lost_scale(scaler: torch.amp.GradScaler) -> None:
    """Refuse to go on searching for a loss scale. Waits for the device, as the search does anyway.

    Raises:
        DivergenceError: no scale gives a finite gradient.
    """
    if scaler.get_scale() < _LEAST_LOSS_SCALE:
        raise DivergenceError(
            "the fp16 loss scale fell below 2^-14 without one finite gradient: the loss itself is infinite or NaN; "
            "lower the learning rate, clip (optimizer.max_grad_norm), or use precision: bf16"
        )
