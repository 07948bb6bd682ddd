"""The learning rate of each update: a torch scheduler behind a linear warm-up.

It is built on the bare optimizer and never prepared by Accelerate, which would step it once per process. It advances with
applied updates (or with epochs) only.
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
_WITHIN = "_schedulers"  # of torch's schedulers that are made of schedulers
_NESTED = "state of a scheduler"


class Successor(NamedTuple):
    """A scheduler that takes the place of the first one late in a run.

    Args:
        scheduler: built on the same optimizer, after the first one.
        start: how much of the run lies before it; steps are applied updates.
        interval: what it counts.
    """

    scheduler: Any
    start: Interval
    interval: Counted


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
        successor: what decides the rate from some point on.
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
        self._show_scheduled()
        self._first_rates = [float(rate) for rate in self._rates]

    @property
    def learning_rates(self) -> list[float]:
        """The rates of the next update, one per parameter group; equal on all ranks."""
        return [float(group["lr"]) for group in self._optimizer.param_groups]

    def rates_before(self, optimizer: Optimizer) -> list[float]:
        """Return the rates that the optimizer was built with, before its scheduler and the warm-up."""
        groups = zip(optimizer.param_groups, self._first_rates, strict=True)
        return [float(group.get("initial_lr", first)) for group, first in groups]

    def after_update(self) -> None:
        """Count one applied update."""
        scheduler, interval = self._in_charge(self._updates)
        if scheduler is None and self._updates >= self._warmup_steps:
            self._updates += 1
            return
        self._hide_factor()
        if interval == "step" and self._updates >= self._warmup_steps:
            _advance(scheduler)
        self._updates += 1
        self._show_scheduled()

    def after_epoch(self) -> None:
        """Count one epoch; it belongs to whoever gave the rate of its last update."""
        scheduler, interval = self._in_charge(self._updates - 1)
        if interval == "epoch" and self._updates >= self._warmup_steps:
            self._hide_factor()
            _advance(scheduler)
            self._show_scheduled()
        self._epochs += 1

    def after_evaluation(self, results: Mapping[str, Any]) -> None:
        """Show a plateau scheduler the monitored result, which is equal on all ranks.

        Raises:
            EvaluationError: the result is no number.
        """
        scheduler, _ = self._in_charge(self._updates)
        if self._monitor is None or scheduler is not self._scheduler or self._updates < self._warmup_steps:
            return
        result = results.get(self._monitor)
        if not isinstance(result, float | int):
            what = (
                "is no result of the evaluation" if result is None else "is no single number, so it cannot be watched"
            )
            raise EvaluationError(f"schedule.monitor: {self._monitor!r} {what}")
        self._hide_factor()
        scheduler.step(result)
        self._show_scheduled()

    def lower(self, factor: float) -> None:
        """Multiply all rates by a factor from now on; a rollback does."""
        self._hide_factor()
        self._lowered *= factor
        self._show_scheduled()

    def state_dict(self) -> dict[str, Any]:
        """Return the state; load it after the optimizer's.

        Of torch's schedulers it has what changed since they were built: the rest are arguments, which the configuration
        may be allowed to change.
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
        """Go on from a state. Rates of an optimizer that starts with others than the state's are changed in proportion.

        Other arguments of a scheduler count from here on. Another scheduler, or one that counts something else, gives the rates
        that it would have given had it been there from the start.
        """
        kinds = state.get("kinds", self._kinds())
        watches_another = state.get("monitor", self._monitor) != self._monitor
        for name, scheduler in self._schedulers().items():
            known = (
                {} if watches_another or kinds.get(name) != self._kinds()[name] else state["schedulers"].get(name, {})
            )
            _load(scheduler, _merged(self._built[name], known))
        self._updates, self._epochs, self._lowered = state["updates"], state["epochs"], state["lowered"]
        if kinds.get("first") != self._kinds().get("first"):
            self._begin_anew()
            return
        groups = zip(self._optimizer.param_groups, state["rates"], self._first_rates, state["first_rates"], strict=True)
        for group, rate, first, first_then in groups:
            group["lr"] = rate if first == first_then or not first_then else rate * (first / first_then)
        self._show_scheduled()

    def _begin_anew(self) -> None:
        """Let the first scheduler give the rate of the next update as if it had given all before it."""
        for group, rate in zip(self._optimizer.param_groups, self._first_rates, strict=True):
            group["lr"] = rate
        count = max(0, self._updates - self._warmup_steps)
        if self._interval == "epoch":  # of equal length: those that ended within the warm-up do not count
            count = self._epochs - self._warmup_steps * self._epochs // max(1, self._updates)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that no update came between
            for _ in range(count):
                _advance(self._scheduler)
        self._show_scheduled()

    def _kinds(self) -> dict[str, list[str]]:
        """Return what each scheduler is and counts; plain data."""
        successor = self._successor
        counted = {"first": self._interval, "successor": None if successor is None else successor.interval}
        return {name: [type(part).__qualname__, str(counted[name])] for name, part in self._schedulers().items()}

    def _schedulers(self) -> dict[str, Any]:
        successor = None if self._successor is None else self._successor.scheduler
        named = {"first": self._scheduler, "successor": successor}
        return {name: scheduler for name, scheduler in named.items() if scheduler is not None}

    def _in_charge(self, updates: int) -> tuple[Any, Counted]:
        """Return the scheduler of the update that has so many before it, and what it counts."""
        late = self._successor
        if late is not None and late.start.reached(steps=updates, epochs=self._epochs):
            return late.scheduler, late.interval
        return self._scheduler, self._interval

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


def _advance(scheduler: Any) -> None:
    if scheduler is not None and not isinstance(scheduler, ReduceLROnPlateau):
        scheduler.step()


def _changed(state: Mapping[str, Any], built: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a scheduler's state has in other values than when it was built, also of schedulers within it."""
    changed = {key: value for key, value in state.items() if not _same(value, built.get(key))}
    if _WITHIN in changed and len(state[_WITHIN]) == len(built.get(_WITHIN, [])):
        changed[_WITHIN] = [_changed(now, then) for now, then in zip(state[_WITHIN], built[_WITHIN], strict=True)]
    return changed


def _merged(built: Mapping[str, Any], changed: Mapping[str, Any]) -> dict[str, Any]:
    """Return a whole state from what was built and what has changed."""
    merged = {**copy.deepcopy(dict(built)), **changed}
    if _WITHIN in changed:
        merged[_WITHIN] = [_merged(then, now) for then, now in zip(built[_WITHIN], changed[_WITHIN], strict=True)]
    return merged


def _state_of(scheduler: Any) -> dict[str, Any]:
    """Return a scheduler's state, in which those that it keeps as attributes are their own states."""
    state: dict[str, Any] = scheduler.state_dict()
    return {key: {_NESTED: _state_of(v)} if isinstance(v, LRScheduler) else v for key, v in state.items()}


def _load(scheduler: Any, state: Mapping[str, Any]) -> None:
    kept = {}
    for key, value in state.items():
        if isinstance(value, Mapping) and _NESTED in value:
            inner = getattr(scheduler, key)
            _load(inner, value[_NESTED])
            kept[key] = inner
        else:
            kept[key] = value
    scheduler.load_state_dict(kept)


def _same(value: Any, other: Any) -> bool:
    try:
        return bool(value == other)
    except (RuntimeError, ValueError):  # tensors
        return False
