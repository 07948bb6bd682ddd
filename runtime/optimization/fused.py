"""Which of torch's fused kernels an optimizer takes."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

_FUSED_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def fused_arguments(
    optimizer_class: type[Optimizer], args: Mapping[str, Any], parameters: Iterable[nn.Parameter]
) -> dict[str, Any]:
    """Return ``{"fused": True}`` where torch has a fused kernel for all parameters and the user did not choose."""
    if {"fused", "foreach", "differentiable"} & set(args) or "fused" not in _parameters_of(optimizer_class):
        return {}
    supported = torch.utils._foreach_utils._get_fused_kernels_supported_devices()
    if all(p.dtype in _FUSED_DTYPES and p.device.type in supported for p in parameters):
        return {"fused": True}
    return {}


def _parameters_of(component: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(component).parameters
