"""Sizes of a run's state per process; an optimizer's is determined by a trial step."""

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
    """Bytes of state on the process that holds most.

    Args:
        parameters: used in forward passes, as held between steps.
        gradients: of trained parameters, as held between two microbatches of a window.
        optimizer: parameter-sized state, and master weights; None if unknown.
        buffers: whole on every process.
        gathered: additional temporary peak: gathered parameters and communication buffers.
    """

    parameters: int
    gradients: int
    optimizer: int | None
    buffers: int
    gathered: int

    def __str__(self) -> str:
        optimizer = "unknown" if self.optimizer is None else in_units(self.optimizer)
        gathered = f"; gathered temporarily: {in_units(self.gathered)}" if self.gathered else ""
        return (
            f"{in_units(self.parameters)} parameters, {in_units(self.gradients)} gradients, {in_units(self.buffers)} buffers, "
            f"{optimizer} optimizer, on each process{gathered}"
        )


def optimizer_bytes(optimizer: Optimizer, held: Callable[[Tensor], float]) -> int | None:
    """Return the bytes of parameter-sized state that an optimizer keeps, or None if a trial step fails.

    Args:
        held: returns the bytes of a parameter that this process updates.
    """
    per_byte_of = cache(_state_per_byte)
    try:
        total = 0.0
        for member in members(optimizer):
            for number, group in enumerate(member.param_groups):
                for parameter in group["params"]:
                    total += per_byte_of(member, number, parameter.dtype, parameter.ndim) * held(parameter)
        return round(total)
    except Exception:  # a user's optimizer may need a closure, or more than one matrix
        return None


def _state_per_byte(member: Optimizer, number: int, dtype: torch.dtype, ndim: int) -> float:
    """Return the ratio of state bytes to parameter bytes, from a step of a similar optimizer on a small parameter."""
    probe = nn.Parameter(torch.ones((2,) * ndim, dtype=dtype))
    known = set(inspect.signature(type(member)).parameters) - {"params", "fused", "foreach", "capturable"}
    group = {key: value for key, value in member.param_groups[number].items() if key in known}
    same = type(member)([probe], **group)
    probe.grad = torch.zeros_like(probe)
    trial_step(same)
    shaped = [value for value in same.state[probe].values() if isinstance(value, Tensor) and value.shape == probe.shape]
    return sum(value.nbytes for value in shaped if value.ndim) / probe.nbytes
