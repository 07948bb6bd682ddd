"""Functions that schedules are given by target."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau


def falling(count: int) -> float:
    return 0.9**count


def slower(count: int) -> float:
    return 1 / (1 + count)


def shrinking(count: int) -> float:
    return 0.95 if count % 2 else 0.8


class Power:
    """A function with state of its own, which torch saves."""

    def __init__(self, base: float) -> None:
        self.base = base
        self.called = 0

    def __call__(self, count: int) -> float:
        self.called += 1
        return self.base**count + 0.001 * self.called


def as_a_function(optimizer: Optimizer, steps: int) -> LambdaLR:
    """What transformers' ``get_…_schedule_with_warmup`` are like."""
    return LambdaLR(optimizer, lambda count: max(0.0, 1 - count / steps))


def hidden(optimizer: Optimizer, **args: Any) -> ReduceLROnPlateau:
    return ReduceLROnPlateau(optimizer, **args)
