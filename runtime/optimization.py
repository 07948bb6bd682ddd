"""What turns gradients into updates: fused kernels and the learning-rate schedule.

The schedule wraps any torch scheduler. It is built on the bare optimizer and never prepared by Accelerate, which would
step it once per process. It advances with applied updates (or with epochs) only.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from runtime.errors import DivergenceError

_FUSED_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_LENGTHS = ("T_max", "total_steps", "total_iters")


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


def length_argument(scheduler_class: type, args: Mapping[str, Any]) -> str | None:
    """Return the required argument that stands for the run's length and was left out, if there is one."""
    for name, parameter in _parameters_of(scheduler_class).items():
        if name in _LENGTHS and name not in args and parameter.default is parameter.empty:
            return name
    if scheduler_class.__name__ == "OneCycleLR" and not {"total_steps", "epochs"} & set(args):
        return "total_steps"
    return None


def _parameters_of(component: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(component).parameters


class Schedule:
    """A torch scheduler behind a linear warm-up.

    Warm-up multiplies whatever rate the scheduler gives, which begins once it is over. The scheduler itself never sees
    the factor: torch's schedulers compute the next rate from the last.

    Args:
        optimizer: the bare optimizer.
        scheduler: built on it, or None for a constant rate after the warm-up.
        interval: what the scheduler counts.
        warmup_steps: applied updates over which the factor rises from ``1 / warmup_steps`` to 1.
        monitor: which evaluation result a plateau scheduler watches.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        scheduler: Any = None,
        *,
        interval: Literal["step", "epoch"] = "step",
        warmup_steps: int = 0,
        monitor: str | None = None,
    ) -> None:
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._interval = interval
        self._warmup_steps = warmup_steps
        self._monitor = monitor
        self._updates = 0
        self._lowered = 1.0
        self._rates: list[Any] = []
        self._show_scheduled()

    @property
    def learning_rates(self) -> list[float]:
        """The rates of the next update, one per parameter group; equal on all ranks."""
        return [float(group["lr"]) for group in self._optimizer.param_groups]

    def after_update(self) -> None:
        """Count one applied update."""
        if self._scheduler is None and self._updates >= self._warmup_steps:
            self._updates += 1
            return
        self._hide_factor()
        if self._interval == "step" and self._updates >= self._warmup_steps:
            self._advance()
        self._updates += 1
        self._show_scheduled()

    def after_epoch(self) -> None:
        """Count one epoch."""
        if self._interval == "epoch" and self._updates >= self._warmup_steps:
            self._hide_factor()
            self._advance()
            self._show_scheduled()

    def after_evaluation(self, results: Mapping[str, Any]) -> None:
        """Show a plateau scheduler the monitored result, which is equal on all ranks."""
        if self._monitor is not None and self._updates >= self._warmup_steps:
            self._hide_factor()
            self._scheduler.step(results[self._monitor])
            self._show_scheduled()

    def lower(self, factor: float) -> None:
        """Multiply all rates by a factor from now on; a rollback does."""
        self._hide_factor()
        self._lowered *= factor
        self._show_scheduled()

    def state_dict(self) -> dict[str, Any]:
        """Return the state; load it after the optimizer's."""
        scheduler = self._scheduler.state_dict() if self._scheduler is not None else None
        return {
            "scheduler": scheduler,
            "updates": self._updates,
            "rates": list(self._rates),
            "lowered": self._lowered,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        if self._scheduler is not None:
            self._scheduler.load_state_dict(state["scheduler"])
        self._updates, self._lowered = state["updates"], state["lowered"]
        for group, rate in zip(self._optimizer.param_groups, state["rates"], strict=True):
            group["lr"] = rate
        self._show_scheduled()

    def _advance(self) -> None:
        if self._scheduler is not None and not isinstance(self._scheduler, ReduceLROnPlateau):
            self._scheduler.step()

    def _hide_factor(self) -> None:
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate

    def _show_scheduled(self) -> None:
        self._rates = [group["lr"] for group in self._optimizer.param_groups]
        if not all(math.isfinite(rate) for rate in self._rates):
            raise DivergenceError(f"the learning rate is {self._rates}: look at optimizer.args.lr and the schedule")
        factor = self._lowered
        if self._updates < self._warmup_steps:
            factor *= (self._updates + 1) / self._warmup_steps
        if factor != 1.0:
            for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
                group["lr"] = rate * factor
