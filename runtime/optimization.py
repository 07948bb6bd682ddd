"""What turns gradients into updates: parameter groups and the optimizer's fused kernels."""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

_FUSED_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def parameter_groups(
    module: nn.Module, groups: Sequence[tuple[Sequence[str], Mapping[str, Any]]]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Share the trainable parameters out over optimizer groups.

    Args:
        module: a TrainingModule; names are matched without the leading ``model.``.
        groups: patterns and optimizer arguments; the first group that matches a name takes it.

    Returns:
        torch's parameter groups, the unmatched parameters last; and the patterns that matched nothing.
    """
    shared: list[list[nn.Parameter]] = [[] for _ in range(len(groups) + 1)]
    used: set[str] = set()
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        number = len(groups)
        for candidate, (patterns, _) in enumerate(groups):
            matching = [p for p in patterns if fnmatch.fnmatchcase(name.removeprefix("model."), p)]
            used.update(matching)
            if matching:
                number = candidate
                break
        shared[number].append(parameter)
    arguments: list[Mapping[str, Any]] = [args for _, args in groups] + [{}]
    made = [{"params": params, **args} for params, args in zip(shared, arguments, strict=True) if params]
    unused = [pattern for patterns, _ in groups for pattern in patterns if pattern not in used]
    return made, unused


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
