"""The learning rate of each update: a torch scheduler after a linear warm-up.

It is built on the bare optimizer and never prepared by Accelerate, which would step it once per process. It advances only
with applied updates (or with epochs).
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from runtime.config.types import Interval
from runtime.errors import DivergenceError, EvaluationError

Counted = Literal["step", "epoch"]
_INNER = "_schedulers"  # state key of torch's composite schedulers
_NESTED = "state of a scheduler"


class Successor(NamedTuple):
    """A scheduler that replaces the first one late in a run.

    Args:
        scheduler: built on the same optimizer, after the first one.
        start: the point at which it takes over; steps are applied updates.
        interval: the unit that it counts.
    """

    scheduler: Any
    start: Interval
    interval: Counted


class Schedule:
    """A torch scheduler after a linear warm-up.

    The warm-up multiplies the scheduler's initial rate; the scheduler starts once the warm-up is over. The scheduler never
    sees the factor: torch's schedulers compute the next rate from the last one.

    Args:
        optimizer: the bare optimizer.
        scheduler: built on it, or None for a constant rate after the warm-up.
        interval: the unit that the scheduler counts.
        warmup_steps: applied updates over which the factor rises from ``1 / warmup_steps`` to 1.
        monitor: the evaluation result that a plateau scheduler monitors.
        successor: replaces the scheduler from some point on.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        scheduler: Any = None,
        *,
        interval: Counted = "step",
        warmup_steps: int = 0,
        monitor: str | None = None,
        successor: Successor | None = None,
    ) -> None:
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._interval: Counted = interval
        self._warmup_steps = warmup_steps
        self._monitor = monitor
        self._successor = successor
        self._updates = self._epochs = 0
        self._lowered = 1.0
        self._built = {name: copy.deepcopy(_state_of(part)) for name, part in self._schedulers().items()}
        self._rates: list[Any] = []
        self._apply_factor()
        self._first_rates = [float(rate) for rate in self._rates]

    @property
    def learning_rates(self) -> list[float]:
        """The rates of the next update, one per parameter group; equal on all ranks."""
        return [float(group["lr"]) for group in self._optimizer.param_groups]

    def rates_before(self, optimizer: Optimizer) -> list[float]:
        """Return the rates that the optimizer was constructed with, before its scheduler and the warm-up."""
        groups = zip(optimizer.param_groups, self._first_rates, strict=True)
        return [float(group.get("initial_lr", first)) for group, first in groups]

    def after_update(self) -> None:
        """Count one applied update."""
        scheduler, interval = self._in_charge(self._updates)
        if scheduler is None and self._updates >= self._warmup_steps:
            self._updates += 1
            return
        self._remove_factor()
        if interval == "step" and self._updates >= self._warmup_steps:
            _advance(scheduler)
        self._updates += 1
        self._apply_factor()

    def after_epoch(self) -> None:
        """Count one epoch, with the scheduler that set the rate of the epoch's last update."""
        scheduler, interval = self._in_charge(self._updates - 1)
        if interval == "epoch" and self._updates >= self._warmup_steps:
            self._remove_factor()
            _advance(scheduler)
            self._apply_factor()
        self._epochs += 1

    def after_evaluation(self, results: Mapping[str, Any]) -> None:
        """Pass the monitored result, which is equal on all ranks, to a plateau scheduler.

        Raises:
            EvaluationError: the result is missing or not a single number.
        """
        scheduler, _ = self._in_charge(self._updates)
        if self._monitor is None or scheduler is not self._scheduler or self._updates < self._warmup_steps:
            return
        result = results.get(self._monitor)
        if not isinstance(result, float | int):
            problem = (
                "is not a result of the evaluation"
                if result is None
                else "is not a single number, so it cannot be monitored"
            )
            raise EvaluationError(f"schedule.monitor: {self._monitor!r} {problem}")
        self._remove_factor()
        scheduler.step(result)
        self._apply_factor()

    def lower(self, factor: float) -> None:
        """Multiply all rates by a factor from now on; called by a rollback."""
        self._remove_factor()
        self._lowered *= factor
        self._apply_factor()

    def state_dict(self) -> dict[str, Any]:
        """Return the state; load it after the optimizer's.

        Of torch's schedulers it holds only what changed since they were built: the rest are arguments, which a resumed run's
        configuration may change.
        """
        return {
            "schedulers": {
                name: _changed(_state_of(part), self._built[name]) for name, part in self._schedulers().items()
            },
            "kinds": self._kinds(),
            "monitor": self._monitor,
            "updates": self._updates,
            "epochs": self._epochs,
            "rates": list(self._rates),
            "first_rates": self._first_rates,
            "lowered": self._lowered,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state. If the optimizer's initial rates differ from the state's, the rates are scaled in proportion.

        Changed arguments of a scheduler apply from here on. Another scheduler, or one that counts another unit, gives the
        rates that it would have given from the start of the run.
        """
        kinds = state.get("kinds", self._kinds())
        monitor_changed = state.get("monitor", self._monitor) != self._monitor
        for name, scheduler in self._schedulers().items():
            stored = (
                {} if monitor_changed or kinds.get(name) != self._kinds()[name] else state["schedulers"].get(name, {})
            )
            _load(scheduler, _merged(self._built[name], stored))
        self._updates, self._epochs, self._lowered = state["updates"], state["epochs"], state["lowered"]
        if kinds.get("first") != self._kinds().get("first"):
            self._replay()
            return
        groups = zip(self._optimizer.param_groups, state["rates"], self._first_rates, state["first_rates"], strict=True)
        for group, rate, first, first_then in groups:
            group["lr"] = rate if first == first_then or not first_then else rate * (first / first_then)
        self._apply_factor()

    def _replay(self) -> None:
        """Advance the first scheduler as if it had been in use from the start of the run."""
        for group, rate in zip(self._optimizer.param_groups, self._first_rates, strict=True):
            group["lr"] = rate
        count = max(0, self._updates - self._warmup_steps)
        if self._interval == "epoch":  # assuming equal lengths: epochs that ended within the warm-up do not count
            count = self._epochs - self._warmup_steps * self._epochs // max(1, self._updates)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that the optimizer was not stepped
            for _ in range(count):
                _advance(self._scheduler)
        self._apply_factor()

    def _kinds(self) -> dict[str, list[str]]:
        """Return the class name and the unit of each scheduler, as plain data."""
        successor = self._successor
        counted = {"first": self._interval, "successor": None if successor is None else successor.interval}
        return {name: [type(part).__qualname__, str(counted[name])] for name, part in self._schedulers().items()}

    def _schedulers(self) -> dict[str, Any]:
        successor = None if self._successor is None else self._successor.scheduler
        named = {"first": self._scheduler, "successor": successor}
        return {name: scheduler for name, scheduler in named.items() if scheduler is not None}

    def _in_charge(self, updates: int) -> tuple[Any, Counted]:
        """Return the scheduler in use after this many updates, and the unit that it counts."""
        successor = self._successor
        if successor is not None and successor.start.reached(steps=updates, epochs=self._epochs):
            return successor.scheduler, successor.interval
        return self._scheduler, self._interval

    def _remove_factor(self) -> None:
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate

    def _apply_factor(self) -> None:
        self._rates = [group["lr"] for group in self._optimizer.param_groups]
        if not all(math.isfinite(rate) for rate in self._rates):
            raise DivergenceError(f"the learning rate is {self._rates}: check optimizer.args.lr and the schedule")
        factor = self._lowered
        if self._updates < self._warmup_steps:
            factor *= (self._updates + 1) / self._warmup_steps
        if factor != 1.0:
            for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
                group["lr"] = rate * factor


def _advance(scheduler: Any) -> None:
    if scheduler is not None and not isinstance(scheduler, ReduceLROnPlateau):
        scheduler.step()


def _changed(state: Mapping[str, Any], built: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a scheduler's state that changed since it was built, including its inner schedulers'."""
    changed = {key: value for key, value in state.items() if not _same(value, built.get(key))}
    if _INNER in changed and len(state[_INNER]) == len(built.get(_INNER, [])):
        changed[_INNER] = [_changed(now, then) for now, then in zip(state[_INNER], built[_INNER], strict=True)]
    return changed


def _merged(built: Mapping[str, Any], changed: Mapping[str, Any]) -> dict[str, Any]:
    """Return the whole state from the initial state and its changed entries."""
    merged = {**copy.deepcopy(dict(built)), **changed}
    if _INNER in changed:
        merged[_INNER] = [_merged(then, now) for then, now in zip(built[_INNER], changed[_INNER], strict=True)]
    return merged


def _state_of(scheduler: Any) -> dict[str, Any]:
    """Return a scheduler's state, with each scheduler in its attributes replaced by that scheduler's state."""
    state: dict[str, Any] = scheduler.state_dict()
    return {key: {_NESTED: _state_of(v)} if isinstance(v, LRScheduler) else v for key, v in state.items()}


def _load(scheduler: Any, state: Mapping[str, Any]) -> None:
    loaded = {}
    for key, value in state.items():
        if isinstance(value, Mapping) and _NESTED in value:
            inner = getattr(scheduler, key)
            _load(inner, value[_NESTED])
            loaded[key] = inner
        else:
            loaded[key] = value
    scheduler.load_state_dict(loaded)


def _same(value: Any, other: Any) -> bool:
    try:
        return bool(value == other)
    except (RuntimeError, ValueError):  # tensors
        return False
