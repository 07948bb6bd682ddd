"""Which optimizers DeepSpeed can shard: elementwise ones.

DeepSpeed flattens a group's parameters into one tensor and gives each rank a part of it. An optimizer that uses a whole matrix
(Muon) or a parameter's size (Adafactor, LAMB) would silently compute wrong updates.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adagrad, Optimizer

from runtime.optimization.combined import CombinedOptimizer
from runtime.optimization.optimizer_eval_mode import switches
from runtime.optimization.trial_steps import trial_copy, trial_step

_STEPS = 3
_ROWS, _COLUMNS = 4, 6


def unshardable(optimizer: Optimizer) -> str | None:
    """Return why DeepSpeed cannot shard an optimizer, or None if it can."""
    name = type(optimizer).__name__
    if isinstance(optimizer, CombinedOptimizer):
        return "groups with separate optimizers cannot be sharded together; use one optimizer, or strategy.kind: ddp"
    if isinstance(optimizer, Adagrad):
        return (
            f"DeepSpeed recreates {name} with default arguments, so groups and schedule would have no effect; use RMSprop or "
            "AdamW, or strategy.kind: ddp"
        )
    if switches(optimizer):
        return f"{name} has other weights for evaluation, which DeepSpeed does not support; use strategy.kind: ddp"
    if not _is_elementwise(optimizer):
        return f"{name} is not elementwise, but DeepSpeed gives it flat parts of parameters; use AdamW, or strategy.kind: ddp"
    return None


def _is_elementwise(optimizer: Optimizer) -> bool:
    """Return whether trial updates of a small matrix and of its flat halves agree, with every group's arguments."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(_ROWS, _COLUMNS, generator=generator)
    gradients = [torch.randn(_ROWS, _COLUMNS, generator=generator) for _ in range(_STEPS)]
    for group in optimizer.param_groups:
        try:
            whole = _updated(optimizer, group, [start], [[gradient] for gradient in gradients])
            halves = _updated(
                optimizer, group, list(start.flatten().chunk(2)), [list(g.flatten().chunk(2)) for g in gradients]
            )
        except (RuntimeError, ValueError, IndexError):  # it requires a matrix
            return False
        if not torch.allclose(whole.flatten(), halves, rtol=1e-5, atol=1e-7):
            return False
    return True


def _updated(
    optimizer: Optimizer, group: dict[str, Any], starts: list[Tensor], gradients: list[list[Tensor]]
) -> Tensor:
    parameters = [nn.Parameter(start.clone()) for start in starts]
    copy = trial_copy(optimizer, group, parameters)
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.clone()
        trial_step(copy)
    return torch.cat([parameter.detach().flatten() for parameter in parameters])
