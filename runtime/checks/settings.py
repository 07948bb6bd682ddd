"""Check settings that contradict each other or the run's length: certain mistakes are errors, possible ones warnings."""

from __future__ import annotations

import math
import os
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch.optim import Optimizer

from runtime.build.builder import Builder
from runtime.build.component import Component
from runtime.build.components import Components
from runtime.build.readers import lacking_arguments
from runtime.build.schedule import ScheduleBuilder
from runtime.config import component
from runtime.config.component import described
from runtime.config.data import LoaderSection
from runtime.config.learning import AveragingSection, GroupSection, ScheduleSection
from runtime.config.locations import Locations
from runtime.config.sections import BestSection, EarlyStoppingSection, LimitSection
from runtime.config.signatures import class_name
from runtime.config.types import Interval
from runtime.data.training_data import TrainingData
from runtime.errors import ConfigurationError, DivergenceError, LockstepError
from runtime.objective import TrainingModule
from runtime.optimization import schedulers
from runtime.optimization.parameter_groups import default_of
from runtime.optimization.patterns import matches
from runtime.optimization.planned_rates import simulate
from runtime.optimization.schedule import Schedule

if TYPE_CHECKING:
    from torchmetrics import Metric

_MOST_STEPS = 20_000  # simulated steps of a schedule: 0.2 s
_MOST_GROWTH = 100  # times the optimizer's learning rate
_HIGHER_IS_BETTER = (
    "accuracy",
    "auroc",
    "auc",
    "f1",
    "precision",
    "recall",
    "iou",
    "dice",
    "r2",
    "bleu",
    "map",
    "ndcg",
)


class SettingProblem(NamedTuple):
    """A setting that is wrong (``refused``) or probably unintended."""

    key: tuple[str, ...]
    what: str
    refused: bool = False


class RunLength(NamedTuple):
    """The run's length; None where unknown."""

    steps: int | None
    epochs: float | None
    steps_per_epoch: int | None

    def holds(self, interval: Interval) -> int | None:
        """Return how often an interval ends within the run; None if unknown."""
        length = self.steps if interval.unit == "step" else self.epochs
        return None if length is None else int(length // interval.count)


def check_settings(
    builder: Builder,
    module: TrainingModule,
    optimizer: Optimizer,
    schedule: Schedule,
    data: TrainingData,
    *,
    processes: int,
) -> Iterator[str]:
    """Yield one warning for each setting that is probably unintended. Equal on every rank; changes no state.

    Args:
        optimizer: without any update so far.
        processes: on this machine.

    Raises:
        ConfigurationError: all wrong settings together.
    """
    values, length = builder.values, _length(builder.values.limit, data)
    whole = f"the run has {length.steps:,} steps" if length.steps is not None else "the run"
    evaluations = length.holds(values.evaluation.every)  # not counting the one at the run's end, which decides nothing
    found = [
        *_rates(builder.schedule, optimizer, schedule, data, length),
        *_optimizer(builder.components.of("optimizer")),
        *_groups(values.optimizer.groups, module),
        *_directions_of(builder),
        *_warms_up_in_time(values.schedule, length, whole),
        *_averaging(values.averaging, length, whole),
    ]
    if values.checkpoint.best and evaluations == 0:
        what = f"{values.evaluation.every} is longer than the run ({whole}): checkpoint.best never ranks a result"
        found.append(SettingProblem(("evaluation", "every"), what))
    found += _stops_early(values.limit.early_stopping, evaluations)
    found += _plateaus(values.schedule, evaluations)
    for number, stage in enumerate(values.model.unfreeze):
        if length.epochs is not None and stage.epoch > math.ceil(length.epochs):
            key = ("model", "unfreeze", str(number), "epoch")
            found.append(SettingProblem(key, f"{stage.epoch} is after the run's last epoch"))
    spike = values.divergence.spike
    if spike is not None and length.steps is not None and spike.window >= length.steps:
        what = f"{spike.window} losses, and {whole}: no spike is ever detected"
        found.append(SettingProblem(("divergence", "spike", "window"), what))
    found += _loader(values.data.loader, processes)
    found += _preparing(builder.components)
    _refuse(found, builder.where)
    yield from (f"{'.'.join(finding.key)}: {finding.what}" for finding in found)


def _preparing(components: Components) -> Iterator[SettingProblem]:
    for name in ("validation", "test"):
        reader = components.find("data", name)
        if reader is not None and (lacking := lacking_arguments(reader, components.of("data", "train"))):
            what = f"has no {', '.join(lacking)}, which data.train has: its samples are prepared differently"
            yield SettingProblem(reader.key, what)


def check_changed_settings(builder: Builder) -> None:
    """Refuse wrong settings among those that may change on resumption: the modes 'min' and 'max'.

    Raises:
        ConfigurationError: all together; equal on every rank.
    """
    _refuse(_directions_of(builder), builder.where)


def _refuse(found: Iterable[SettingProblem], where: Locations) -> None:
    if refused := [where.problem(finding.key, finding.what) for finding in found if finding.refused]:
        raise ConfigurationError(refused)


def _length(limit: LimitSection, data: TrainingData) -> RunLength:
    per_epoch = data.steps_per_epoch
    steps = limit.steps if limit.steps is not None else data.num_steps(limit.epochs or 0)
    epochs = (
        limit.epochs if limit.epochs is not None else limit.steps / per_epoch if limit.steps and per_epoch else None
    )
    return RunLength(steps, epochs, per_epoch)


def _rates(
    builder: ScheduleBuilder, optimizer: Optimizer, schedule: Schedule, data: TrainingData, length: RunLength
) -> Iterator[SettingProblem]:
    """Simulate the schedule over the run, on a copy of the optimizer."""
    section, scheduler = builder.section, builder.scheduler
    key, name = (
        (("optimizer", "args"), "the optimizer")
        if section is None
        else (("schedule",), section.target or "the warm-up")
    )
    if length.steps is None:
        return
    try:
        rehearsed = builder.rehearse(optimizer, schedule, builder.length(data))
        steps = min(length.steps, _MOST_STEPS)
        curve = simulate(rehearsed, steps=steps, steps_per_epoch=length.steps_per_epoch)
    except DivergenceError as error:
        yield SettingProblem(key, f"{name}: {error}", refused=True)
        return
    except LockstepError:
        raise
    except Exception as error:
        if scheduler is not None and not schedulers.is_known(scheduler.target, scheduler.code):
            return  # a user-defined class may need the optimizer itself; its error appears when it is stepped
        yield SettingProblem(key, f"{name} raised {described(error)}", refused=True)
        return
    for rates in curve.rates:
        negative = next((step for step, rate in enumerate(rates, 1) if rate < 0), None)
        if negative is not None:
            yield SettingProblem(
                key,
                f"{name} gives a learning rate of {rates[negative - 1]:.3g} at step {negative}; it must not be negative",
                True,
            )
            return
    highest = [max(column) for column in zip(*curve.rates, strict=True)]
    constant = all(min(rates) == max(rates) for rates in curve.rates)
    if not any(highest):
        yield SettingProblem(key, "all learning rates are 0 through the whole run, so nothing is trained")
    elif section is not None and section.target is not None and constant and 1 < length.steps == steps:
        if not section.watches:
            yield SettingProblem(
                key, f"{name} never changes the learning rate: the run has {steps:,} steps; see schedule.interval"
            )
    elif section is not None:
        full = max(float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups)
        if highest[-1] > _MOST_GROWTH * full:
            yield SettingProblem(
                key, f"{name} makes the learning rate grow from {full:.3g} to {highest[-1]:.3g} at the run's end"
            )
        yield from _shape(key, name, highest, steps, warmup=section.warmup_steps)


def _shape(key: tuple[str, ...], name: str, rates: list[float], steps: int, *, warmup: int) -> Iterator[SettingProblem]:
    last = max(step for step, rate in enumerate(rates, 1) if rate > 0)
    if steps - last > max(1, steps // 20):
        yield SettingProblem(
            key, f"{name} makes the learning rate 0 after step {last:,} of {steps:,}: nothing is trained from there on"
        )
    start = min(warmup, steps - 1)  # a warm-up rises intentionally
    lowest = rates.index(min(rates[start:]), start)
    if name.endswith("CosineAnnealingLR") and max(rates[lowest:]) > 2 * rates[lowest] + 0.05 * max(rates):
        yield SettingProblem(
            key, f"{name} is lowest after step {lowest:,} of {steps:,}, and rises again: T_max is shorter than the run"
        )


def _optimizer(optimizer: Component) -> Iterator[SettingProblem]:
    section = optimizer.section
    parts: list[tuple[tuple[str, ...], str, dict[str, Any]]] = [(("optimizer",), section.target, section.args)]
    for number, group in enumerate(section.groups):
        args = group.args if group.target else {**section.args, **group.args}
        parts.append((("optimizer", "groups", str(number)), group.target or section.target, args))
    named: set[str] = set()
    for key, target, args in parts:
        made = component.locate(target, namespaces=optimizer.namespaces, code=optimizer.code)
        if not getattr(made, "__module__", "").startswith("torch.optim"):
            continue  # arguments of a user-defined class may have another meaning
        rate, decay = (default_of(made, args, name) for name in ("lr", "weight_decay"))
        for name, wrong, what, refused in (
            ("lr", _number(args.get("lr")) < 0, "is {}: it must not be negative", True),
            ("momentum", _number(args.get("momentum")) >= 1, "is {}: the update grows without bound from 1 on", True),
            ("momentum", _number(args.get("momentum")) < 0, "is {}: it must not be negative", True),
            ("weight_decay", _number(args.get("weight_decay")) < 0, "is {}: weights would grow", True),
            ("eps", args.get("eps") == 0, "is 0: a parameter whose gradient is zero becomes NaN", False),
            ("maximize", args.get("maximize") is True, "is true: the loss is maximized", False),
            ("weight_decay", class_name(target) == "AdamW" and _number(rate) * _number(decay) >= 1,
             "is {}; times the learning rate " + f"{rate} this is at least 1: each update removes the whole weight", True),
        ):  # fmt: skip
            if wrong and name not in named:
                named.add(name)
                yield SettingProblem((*key, "args", name), what.format(args.get(name, decay)), refused)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def _groups(groups: Sequence[GroupSection], module: TrainingModule) -> Iterator[SettingProblem]:
    """Compare each group with earlier ones, which take precedence."""
    names = [name.removeprefix("model.") for name, _ in module.named_parameters()]
    for number, group in enumerate(groups):
        own = [name for name in names if matches(name, group.match)]
        before = {name: n for n in reversed(range(number)) for name in own if matches(name, groups[n].match)}
        key = ("optimizer", "groups", str(number), "match")
        if own and len(before) == len(own):
            yield SettingProblem(
                key, f"everything it matches is already in optimizer.groups.{min(before.values())}", refused=True
            )
        elif before:
            name, first = next(iter(before.items()))
            others = f" and {len(before) - 1} more" if len(before) > 1 else ""
            yield SettingProblem(
                key, f"{name}{others} is also matched by optimizer.groups.{first}, which takes precedence"
            )


def _directions_of(builder: Builder) -> list[SettingProblem]:
    values = builder.values
    modes = _modes(values.checkpoint.best, values.limit.early_stopping, values.schedule)
    return [*_directions(modes, builder.metrics(), losses={"loss", *values.objective.losses})] if modes else []


def _modes(
    best: Sequence[BestSection], stopping: EarlyStoppingSection | None, schedule: ScheduleSection | None
) -> list[tuple[tuple[str, ...], str, str]]:
    """Return each mode ('min' or 'max') with its key and the watched result."""
    modes: list[tuple[tuple[str, ...], str, str]]
    modes = [(("checkpoint", "best", str(n), "mode"), b.metric, b.mode) for n, b in enumerate(best)]
    if stopping is not None:
        modes.append((("limit", "early_stopping", "mode"), stopping.metric, stopping.mode))
    if schedule is not None and schedule.monitor is not None:
        modes.append((("schedule", "args", "mode"), schedule.monitor, schedule.args.get("mode", "min")))
    return modes


def _directions(
    modes: Iterable[tuple[tuple[str, ...], str, str]], metrics: Mapping[str, Metric], *, losses: Container[str]
) -> Iterator[SettingProblem]:
    """Compare each mode with the better direction of the watched result.

    Args:
        losses: names of results for which lower is better.
    """
    for key, result, mode in modes:
        better = "min" if result.partition("/")[0] in losses else None
        if result in metrics and metrics[result].higher_is_better is not None:
            better = "max" if metrics[result].higher_is_better else "min"
        if better is not None and mode != better:
            word = {"min": "lower", "max": "higher"}[better]
            yield SettingProblem(
                key, f"is {mode}, but {word} is better for {result!r}: write mode: {better}", refused=True
            )
        elif better is None and mode == "min" and any(word in result.lower() for word in _HIGHER_IS_BETTER):
            yield SettingProblem(key, f"is min, but higher is better for most results with names like {result!r}")


def _warms_up_in_time(section: ScheduleSection | None, length: RunLength, whole: str) -> Iterator[SettingProblem]:
    warmup = section.warmup_steps if section is not None else 0
    if length.steps is not None and warmup > length.steps:
        what = f"{warmup:,} updates, and {whole}: the learning rate never reaches its full value"
        yield SettingProblem(("schedule", "warmup_steps"), what)


def _stops_early(section: EarlyStoppingSection | None, evaluations: int | None) -> Iterator[SettingProblem]:
    if section is not None and evaluations is not None and evaluations <= section.patience:
        what = f"{section.patience} evaluations, and the run has {evaluations}: it can never stop early"
        yield SettingProblem(("limit", "early_stopping", "patience"), what)


def _plateaus(section: ScheduleSection | None, evaluations: int | None) -> Iterator[SettingProblem]:
    """Check a schedule that depends on evaluations."""
    if section is None or not section.watches:
        return
    if _number(section.args.get("factor")) <= 0:
        what = f"is {section.args['factor']}: the learning rate would be 0 once {section.monitor} no longer improves"
        yield SettingProblem(("schedule", "args", "factor"), what, refused=True)
    if evaluations is not None:
        patience = section.args.get("patience", 10)
        if isinstance(patience, int) and evaluations <= patience:
            what = f"{patience} evaluations, and the run has {evaluations}: the learning rate is never lowered"
            yield SettingProblem(("schedule", "args", "patience"), what)


def _averaging(section: AveragingSection | None, length: RunLength, whole: str) -> Iterator[SettingProblem]:
    if section is None or length.steps is None:
        return

    def steps(interval: Interval) -> int | None:
        per = 1 if interval.unit == "step" else length.steps_per_epoch
        return None if per is None else interval.count * per

    start = steps(section.start) if section.start is not None else 0
    every = steps(section.interval)
    if start is None or every is None:
        return
    if start >= length.steps:
        what = f"{section.start} is not before the end of the run, so nothing would be averaged: {whole}"
        yield SettingProblem(("averaging", "start"), what, refused=True)
    elif length.steps // every == start // every:
        what = f"the average would be updated every {section.interval}, which does not occur after its start: {whole}"
        yield SettingProblem(("averaging", "every"), what)
    elif section.anneal is not None:
        anneal = section.anneal.steps or (section.anneal.epochs or 0) * (length.steps_per_epoch or 0)
        if anneal > length.steps - start:
            yield SettingProblem(
                ("averaging", "anneal"),
                f"is longer than the rest of the run: {section.learning_rate} is not reached",
            )


def _loader(loader: LoaderSection, processes: int) -> Iterator[SettingProblem]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if loader.num_workers * processes > 4 * cores:
        each = f" for each of {processes} processes" if processes > 1 else ""
        yield SettingProblem(
            ("data", "loader", "num_workers"),
            f"{loader.num_workers} workers{each} on {cores} cores: they compete for CPU time",
        )
