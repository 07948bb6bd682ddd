"""Builds the learning rate schedule from its section and the run's length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau
from torch.optim.swa_utils import SWALR

from runtime.build.component import Component
from runtime.config.component import ComponentError
from runtime.config.learning import AnnealSection, AveragingSection, ScheduleSection
from runtime.config.locations import Locations
from runtime.config.sections import LimitSection
from runtime.data.training_data import TrainingData
from runtime.errors import DivergenceError
from runtime.optimization import schedulers
from runtime.optimization.rehearsal import StandIn, try_scheduler
from runtime.optimization.schedule import Schedule, Successor


def schedule_mistakes(scheduler: Component) -> list[ComponentError]:
    """Check a scheduler and those nested in it."""
    filled_in = length_arguments(scheduler)
    return schedulers.check(scheduler.target, scheduler.args, code=scheduler.code, filled_in=filled_in)


def length_arguments(scheduler: Component | None) -> list[str]:
    """Return the scheduler's argument for its length, if it has one that is not configured."""
    if scheduler is None:
        return []
    try:
        located = scheduler.locate()
    except ComponentError:
        return []  # its check reports this
    name = schedulers.length_argument(located, scheduler.args) if callable(located) else None
    return [name] if name else []


@dataclass(frozen=True)
class ScheduleBuilder:
    """Builds the schedule of a run.

    Args:
        section: ``schedule``, or None.
        scheduler: its component, if it has a target.
        averaging: may set the learning rate while late weights are averaged.
        limit: may determine the length of the schedule.
    """

    section: ScheduleSection | None
    scheduler: Component | None
    averaging: AveragingSection | None
    limit: LimitSection
    where: Locations

    @property
    def follows_limit(self) -> bool:
        """Whether the schedule's length is derived from the run's limit, which then cannot be changed."""
        return bool(length_arguments(self.scheduler))

    def length(self, data: TrainingData) -> int | None:
        """Return the number of epochs, or of steps after the warm-up, in the whole run; None if unknown.

        Raises:
            ConfigurationError: it is unknown, and the scheduler needs it.
        """
        limit, section, steps_per_epoch = self.limit, self.section, data.steps_per_epoch
        by_epoch = section is not None and section.interval == "epoch"
        if steps_per_epoch is None and (limit.epochs is None if by_epoch else limit.steps is None):
            for name in length_arguments(self.scheduler):
                what = f"needs {name}: it cannot be derived from the limit, since a stream's length is unknown"
                raise self.where.error(("schedule", "args"), what)
            return None
        if by_epoch:
            return limit.epochs or -(-(limit.steps or 0) // (steps_per_epoch or 1))
        steps = limit.steps or data.num_steps(limit.epochs or 0) or 0
        return max(1, steps - (section.warmup_steps if section else 0))

    def build(self, optimizer: Optimizer, length: int | None) -> Schedule:
        """Build the schedule on the bare optimizer.

        Args:
            length: see :meth:`length`.
        """
        try:
            return self._schedule(optimizer, length)
        except DivergenceError as error:
            key = "optimizer" if self.section is None else "schedule"
            raise self.where.error((key,), str(error)) from error

    def rehearse(self, optimizer: Optimizer, schedule: Schedule, length: int | None) -> Schedule:
        """Build a copy of a run's schedule on a stand-in for its optimizer, to simulate the run without side effects."""
        return self.build(StandIn(optimizer, schedule.rates_before(optimizer)), length)

    def _schedule(self, optimizer: Optimizer, length: int | None) -> Schedule:
        section = self.section
        if section is None:
            return Schedule(optimizer, successor=_successor(self.averaging, optimizer))
        scheduler = None if self.scheduler is None else _scheduler(self.scheduler, optimizer, length)
        return Schedule(
            optimizer,
            scheduler,
            interval=section.interval,
            warmup_steps=section.warmup_steps,
            monitor=section.monitor,
            successor=_successor(self.averaging, optimizer),
        )


def _successor(averaging: AveragingSection | None, optimizer: Optimizer) -> Successor | None:
    """Build the schedule of the rate while late weights are averaged; torch requires building it after the first scheduler."""
    if averaging is None or averaging.start is None or averaging.learning_rate is None:
        return None
    anneal = averaging.anneal or AnnealSection(epochs=10)
    length = anneal.epochs or anneal.steps
    assert length is not None
    scheduler = SWALR(optimizer, averaging.learning_rate, anneal_epochs=length, anneal_strategy=anneal.strategy)
    return Successor(scheduler, averaging.start, "epoch" if anneal.epochs else "step")


def _scheduler(bound: Component, optimizer: Optimizer, length: int | None) -> Any:
    section, arguments = bound.section, {**bound.args, **dict.fromkeys(length_arguments(bound), length)}
    with bound.errors_at_key():
        if schedulers.is_known(bound.target, bound.code):
            stand_in = StandIn(optimizer)
            try_scheduler(schedulers.build(bound.target, arguments, stand_in, code=bound.code), bound.target)
        scheduler = schedulers.build(bound.target, arguments, optimizer, code=bound.code)
    if isinstance(scheduler, ReduceLROnPlateau) != section.watches:
        raise bound.error(
            f"builds a {type(scheduler).__name__}; a class that follows evaluations must have a name that ends in "
            "ReduceLROnPlateau, and no other class may",
            "target",
        )
    if isinstance(scheduler, OneCycleLR) and length is not None and scheduler.total_steps < length:
        what = f"OneCycleLR ends after {scheduler.total_steps} {section.interval}s, but the run has {length}"
        raise bound.error(what, "args")
    return scheduler
