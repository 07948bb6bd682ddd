"""Optimizer, schedule and what is frozen, from their sections; every mistake comes back with file, line and key."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau
from torch.optim.swa_utils import SWALR

from runtime.build.resolver import wrong
from runtime.config import component
from runtime.config.component import ComponentError
from runtime.config.file import LoadedConfiguration
from runtime.config.learning import Anneal, Averaging
from runtime.config.learning import Schedule as ScheduleSection
from runtime.data.training_data import TrainingData
from runtime.errors import DivergenceError
from runtime.objective import TrainingModule
from runtime.optimization import optimizer as optimizer_building
from runtime.optimization import schedulers
from runtime.optimization.freezing import Freezing
from runtime.optimization.optimizer_eval_mode import switches
from runtime.optimization.parameter_groups import ParameterGroup
from runtime.optimization.rehearsal import StandIn, try_scheduler
from runtime.optimization.schedule import Schedule, Successor


def build_optimizer(loaded: LoadedConfiguration, module: nn.Module) -> Optimizer:
    """Build the optimizer over a TrainingModule's trainable parameters, fused where torch can."""
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise wrong(loaded, ("model",), "has no trainable parameters")
    try:
        optimizer = optimizer_building.build(loaded.values.optimizer, module, loaded.code)
    except ComponentError as mistake:
        raise wrong(loaded, ("optimizer", *mistake.path), mistake.what) from mistake
    if switches(optimizer) and loaded.values.averaging is not None:
        raise wrong(loaded, ("averaging",), f"{type(optimizer).__name__} averages by itself; leave 'averaging' out")
    return optimizer


def parameter_groups(loaded: LoadedConfiguration, module: nn.Module) -> list[ParameterGroup]:
    """Return what :func:`build_optimizer` makes groups of, in the order of the optimizer's groups."""
    return optimizer_building.groups_of(loaded.values.optimizer, module, loaded.code)


def group_names(loaded: LoadedConfiguration, module: nn.Module, optimizer: Optimizer) -> tuple[str, ...]:
    """Name each of an optimizer's parameter groups, as ``lockstep show`` does; all that are ever trained must be trainable."""
    labels = [group.label for group in parameter_groups(loaded, module)]
    if len(labels) != len(optimizer.param_groups):  # an optimizer of the user's own that makes other groups
        labels = [f"group {number}" for number in range(len(optimizer.param_groups))]
    return tuple(
        label if labels.count(label) == 1 else f"{label} {labels[: number + 1].count(label)}"
        for number, label in enumerate(labels)
    )


def build_freezing(loaded: LoadedConfiguration, module: TrainingModule) -> Freezing:
    """Build what freezes and unfreezes parameters; nothing is frozen by it yet."""
    section = loaded.values.model
    stages = [(stage.epoch, stage.match) for stage in section.unfreeze]
    try:
        freezing = Freezing(module, freeze=section.freeze, unfreeze=stages, mode=section.frozen_mode)
    except ComponentError as mistake:
        raise wrong(loaded, ("model", *mistake.path), mistake.what) from mistake
    if not freezing.trains_at_first:
        raise wrong(loaded, ("model", "freeze"), "leaves no parameter to train in the first epoch")
    return freezing


def length_arguments(loaded: LoadedConfiguration) -> list[str]:
    """Return the scheduler's argument for its length, if it has one that was left out."""
    section = loaded.values.schedule
    if section is None or section.target is None:
        return []
    try:
        found = component.locate(section.target, namespaces=schedulers.NAMESPACES, code=loaded.code)
    except ComponentError:
        return []  # told by check_components
    name = schedulers.length_argument(found, section.args) if callable(found) else None
    return [name] if name else []


def build_schedule(loaded: LoadedConfiguration, optimizer: Optimizer, length: int | None) -> Schedule:
    """Build the schedule on the bare optimizer.

    Args:
        length: see :func:`schedule_length`.
    """
    try:
        return _schedule(loaded, optimizer, length)
    except DivergenceError as error:
        key = "optimizer" if loaded.values.schedule is None else "schedule"
        raise wrong(loaded, (key,), str(error)) from error


def _schedule(loaded: LoadedConfiguration, optimizer: Optimizer, length: int | None) -> Schedule:
    section, averaging = loaded.values.schedule, loaded.values.averaging
    if section is None:
        return Schedule(optimizer, successor=_successor(averaging, optimizer))
    scheduler = None if section.target is None else _scheduler(loaded, section, optimizer, length)
    return Schedule(
        optimizer,
        scheduler,
        interval=section.interval,
        warmup_steps=section.warmup_steps,
        monitor=section.monitor,
        successor=_successor(averaging, optimizer),
    )


def _successor(averaging: Averaging | None, optimizer: Optimizer) -> Successor | None:
    """Build what the rate follows while late weights are averaged; torch wants it built after the first scheduler."""
    if averaging is None or averaging.start is None or averaging.learning_rate is None:
        return None
    anneal = averaging.anneal or Anneal(epochs=10)
    length = anneal.epochs or anneal.steps
    assert length is not None
    scheduler = SWALR(optimizer, averaging.learning_rate, anneal_epochs=length, anneal_strategy=anneal.strategy)
    return Successor(scheduler, averaging.start, "epoch" if anneal.epochs else "step")


def _scheduler(loaded: LoadedConfiguration, section: ScheduleSection, optimizer: Optimizer, length: int | None) -> Any:
    assert section.target is not None
    arguments = {**section.args, **dict.fromkeys(length_arguments(loaded), length)}
    try:
        if schedulers.is_known(section.target, loaded.code):
            stand_in = StandIn(optimizer)
            try_scheduler(schedulers.build(section.target, arguments, stand_in, code=loaded.code), section.target)
        scheduler = schedulers.build(section.target, arguments, optimizer, code=loaded.code)
    except ComponentError as mistake:
        raise wrong(loaded, ("schedule", *mistake.path), mistake.what) from mistake
    if isinstance(scheduler, ReduceLROnPlateau) != section.watches:
        raise wrong(
            loaded,
            ("schedule", "target"),
            f"makes a {type(scheduler).__name__}; a class that follows evaluations is known by a name that ends in "
            "ReduceLROnPlateau",
        )
    if isinstance(scheduler, OneCycleLR) and length is not None and scheduler.total_steps < length:
        what = f"OneCycleLR ends after {scheduler.total_steps} {section.interval}s, and the run has {length} for it"
        raise wrong(loaded, ("schedule", "args"), what)
    return scheduler


def rehearsed_schedule(
    loaded: LoadedConfiguration, optimizer: Optimizer, schedule: Schedule, length: int | None
) -> Schedule:
    """Build a run's schedule once more, on a stand-in for its optimizer, to be driven through the run without a trace."""
    return build_schedule(loaded, StandIn(optimizer, schedule.rates_before(optimizer)), length)


def schedule_length(loaded: LoadedConfiguration, data: TrainingData) -> int | None:
    """Return how many epochs, or steps after the warm-up, the scheduler counts in the whole run; None where nobody knows.

    Raises:
        ConfigurationError: nobody knows, and the scheduler was to be told.
    """
    limit, section, steps_per_epoch = loaded.values.limit, loaded.values.schedule, data.steps_per_epoch
    by_epoch = section is not None and section.interval == "epoch"
    if steps_per_epoch is None and (limit.epochs is None if by_epoch else limit.steps is None):
        if follows_limit(loaded):
            name = length_arguments(loaded)[0]
            raise wrong(
                loaded,
                ("schedule", "args"),
                f"needs {name}: it cannot follow from the limit, as a stream's length is unknown",
            )
        return None
    if by_epoch:
        return limit.epochs or -(-(limit.steps or 0) // (steps_per_epoch or 1))
    steps = limit.steps or data.num_steps(limit.epochs or 0) or 0
    return max(1, steps - (section.warmup_steps if section else 0))


def follows_limit(loaded: LoadedConfiguration) -> bool:
    """Tell whether the schedule's length was left to follow from the run's limit, which then cannot be changed."""
    return bool(length_arguments(loaded))
