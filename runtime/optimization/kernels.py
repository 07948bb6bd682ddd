"""Selection of torch's optimizer kernels."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from runtime.config.component import ComponentError
from runtime.state.memory_layout import is_dense

_FUSED_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def kernel_arguments(
    optimizer_class: type[Optimizer], args: Mapping[str, Any], parameters: Sequence[nn.Parameter], *, elementwise: bool
) -> dict[str, Any]:
    """Return ``{"fused": True}`` if torch has a fused kernel for all parameters and the user did not choose.

    Args:
        elementwise: choose ``{"foreach": True}`` instead, which rounds an element alike wherever a tensor is cut between ranks.
            Fused kernels for CPUs do not (torch 2.13).

    Raises:
        ComponentError: the user chose ``fused``, and a parameter has gaps in memory: the kernels walk raw memory, and would
            update the wrong elements (torch 2.13).
    """
    gaps = next((p for p in parameters if not is_dense(p.shape, p.stride())), None)
    if gaps is not None and args.get("fused"):
        raise ComponentError(
            f"a parameter of shape {tuple(gaps.shape)} is a view with gaps in memory (strides {tuple(gaps.stride())}), which "
            "fused kernels update wrongly: make it with .contiguous(), or leave fused out",
            ("args", "fused"),
        )
    known = _parameters_of(optimizer_class)
    if {"fused", "foreach", "differentiable"} & set(args):
        return {}
    if elementwise:
        return {"foreach": True} if "foreach" in known else {}
    if "fused" not in known:
        return {}
    supported = torch.utils._foreach_utils._get_fused_kernels_supported_devices()
    if gaps is None and all(p.dtype in _FUSED_DTYPES and p.device.type in supported for p in parameters):
        return {"fused": True}
    return {}


def _parameters_of(component: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(component).parameters
