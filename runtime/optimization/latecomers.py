"""Parameters whose first gradient comes later than others': unfrozen ones, a branch that early steps do not use.

Torch's fused kernel of SGD (2.11 to 2.13) takes either the momentum of all parameters of a group or of none, and raises a
TypeError where some have none yet.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import SGD, Optimizer
from torch.optim.sgd import sgd

from runtime.optimization.combined import members


class Latecomers:
    """Makes the first update of latecomers apart from the others' of the same step.

    Args:
        optimizer: all of whose updates come after :meth:`update`.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        found: list[Any] = [member for member in members(optimizer) if type(member).step is SGD.step]
        self._optimizers = [(member, sum(len(group["params"]) for group in member.param_groups)) for member in found]

    def update(self) -> None:
        """Apply and clear the gradients of latecomers, before the optimizer's own step."""
        for optimizer, num_parameters in self._optimizers:
            if len(optimizer.state) < num_parameters:
                for group in optimizer.param_groups:
                    if group["fused"] and group["momentum"]:
                        _update(optimizer, group)


@torch.no_grad()
def _update(optimizer: SGD, group: dict[str, Any]) -> None:
    begun: list[torch.Tensor] = []
    late: list[torch.Tensor] = []
    for parameter in group["params"]:
        if parameter.grad is not None:
            has_momentum = (
                parameter in optimizer.state and optimizer.state[parameter].get("momentum_buffer") is not None
            )
            (begun if has_momentum else late).append(parameter)
    if not begun or not late:
        return
    gradients = [gradient for parameter in late if (gradient := parameter.grad) is not None]
    momenta: list[Any] = [None] * len(late)
    keys = ("weight_decay", "momentum", "lr", "dampening", "nesterov", "maximize")
    sgd(late, gradients, momenta, fused=True, **{key: group[key] for key in keys})
    for parameter, momentum in zip(late, momenta, strict=True):
        optimizer.state[parameter]["momentum_buffer"] = momentum
        parameter.grad = None
