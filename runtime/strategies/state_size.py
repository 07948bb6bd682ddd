"""The bytes of a run's state: what is counted apart, and how large an optimizer's is, which only a step of it tells."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from runtime.optimization.combined import members
from runtime.optimization.trial_steps import trial_step
from runtime.wording import in_units


@dataclass(frozen=True)
class StateBytes:
    """Of the process that holds most.

    Args:
        parameters: that passes run on, as they are held between steps.
        gradients: of what is trained, as they are held between two microbatches of a window.
        optimizer: state that is as large as the parameters, and weights of its own; None where it cannot be told.
        buffers: whole on every process.
        gathered: besides, for a while: what a pass has whole of others' parts, and what is on its way between processes.
    """

    parameters: int
    gradients: int
    optimizer: int | None
    buffers: int
    gathered: int

    def __str__(self) -> str:
        optimizer = "unknown" if self.optimizer is None else in_units(self.optimizer)
        gathered = f"; gathered for a while: {in_units(self.gathered)}" if self.gathered else ""
        return (
            f"{in_units(self.parameters)} parameters, {in_units(self.gradients)} gradients, {in_units(self.buffers)} buffers, "
            f"{optimizer} optimizer, on each process{gathered}"
        )


def optimizer_bytes(optimizer: Optimizer, held: Callable[[Tensor], float]) -> int | None:
    """Return the size of the state that an optimizer keeps for its parameters, or None where it cannot be told.

    Args:
        held: bytes of a parameter that this process updates.
    """
    per_byte_of = cache(_state_per_byte)
    try:
        total = 0.0
        for member in members(optimizer):
            for number, group in enumerate(member.param_groups):
                for parameter in group["params"]:
                    total += per_byte_of(member, number, parameter.dtype, parameter.ndim) * held(parameter)
        return round(total)
    except Exception:  # an optimizer of the user's may want a closure, or more than one matrix
        return None


def _state_per_byte(member: Optimizer, number: int, dtype: torch.dtype, ndim: int) -> float:
    """Return the state's size over the parameter's, found by a step of an optimizer like this one on a small parameter."""
    probe = nn.Parameter(torch.ones((2,) * ndim, dtype=dtype))
    known = set(inspect.signature(type(member)).parameters) - {"params", "fused", "foreach", "capturable"}
    group = {key: value for key, value in member.param_groups[number].items() if key in known}
    same = type(member)([probe], **group)
    probe.grad = torch.zeros_like(probe)
    trial_step(same)
    shaped = [value for value in same.state[probe].values() if isinstance(value, Tensor) and value.shape == probe.shape]
    return sum(value.nbytes for value in shaped if value.ndim) / probe.nbytes
