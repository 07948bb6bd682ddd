"""Parameters that get their first gradient later than others: unfrozen ones, or a branch that early steps do not use.

Torch's fused SGD kernel (2.11 to 2.13) raises a TypeError if only some parameters of a group have a momentum buffer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import SGD, Optimizer
from torch.optim.sgd import sgd

from runtime.optimization.combined import members


class Latecomers:
    """Applies the first update of such parameters separately; call :meth:`update` before each step of the optimizer."""

    def __init__(self, optimizer: Optimizer) -> None:
        sgds: list[Any] = [member for member in members(optimizer) if type(member).step is SGD.step]
        self._optimizers = [(member, sum(len(group["params"]) for group in member.param_groups)) for member in sgds]

    def update(self) -> None:
        """Apply and clear the first gradients of such parameters."""
        for optimizer, num_parameters in self._optimizers:
            if len(optimizer.state) < num_parameters:
                for group in optimizer.param_groups:
                    if group["fused"] and group["momentum"]:
                        _update(optimizer, group)


@torch.no_grad()
def _update(optimizer: SGD, group: dict[str, Any]) -> None:
    earlier: list[torch.Tensor] = []
    late: list[torch.Tensor] = []
    for parameter in group["params"]:
        if parameter.grad is not None:
            has_momentum = (
                parameter in optimizer.state and optimizer.state[parameter].get("momentum_buffer") is not None
            )
            (earlier if has_momentum else late).append(parameter)
    if not earlier or not late:
        return
    gradients = [gradient for parameter in late if (gradient := parameter.grad) is not None]
    momenta: list[Any] = [None] * len(late)
    keys = ("weight_decay", "momentum", "lr", "dampening", "nesterov", "maximize")
    sgd(late, gradients, momenta, fused=True, **{key: group[key] for key in keys})
    for parameter, momentum in zip(late, momenta, strict=True):
        optimizer.state[parameter]["momentum_buffer"] = momentum
        parameter.grad = None
