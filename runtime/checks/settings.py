"""Settings that contradict each other or the run's length: what cannot be meant is refused, what might be is one line."""

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

_MOST_STEPS = 20_000  # of a schedule that are looked at: 0.2 s
_MOST_GROWTH = 100  # times the optimizer's own rate
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
    """What a setting says that is not, or hardly, meant."""

    key: tuple[str, ...]
    what: str
    refused: bool = False


class RunLength(NamedTuple):
    """The run's length as far as it is known."""

    steps: int | None
    epochs: float | None
    steps_per_epoch: int | None

    def holds(self, interval: Interval) -> int | None:
        """Return how often an interval ends within the run; None where nobody knows."""
        whole = self.steps if interval.unit == "step" else self.epochs
        return None if whole is None else int(whole // interval.count)


def check_settings(
    builder: Builder,
    module: TrainingModule,
    optimizer: Optimizer,
    schedule: Schedule,
    data: TrainingData,
    *,
    processes: int,
) -> Iterator[str]:
    """Yield one line for each setting that might not be meant. Alike on every rank; leaves no trace.

    Args:
        optimizer: has made no update.
        processes: on this machine.

    Raises:
        ConfigurationError: settings that cannot be meant, all together.
    """
    values, length = builder.values, _length(builder.values.limit, data)
    whole = f"the run has {length.steps:,} steps" if length.steps is not None else "the run"
    evaluations = length.holds(values.evaluation.every)  # the one at the run's end decides nothing
    found = [
        *_rates(builder.schedule, optimizer, schedule, data, length),
        *_optimizer(builder.components.of("optimizer")),
        *_groups(values.optimizer.groups, module),
        *_directions_of(builder),
        *_warms_up_in_time(values.schedule, length, whole),
        *_averaging(values.averaging, length, whole),
    ]
    if values.checkpoint.best and evaluations == 0:
        what = f"{values.evaluation.every} is longer than the run ({whole}): checkpoint.best never judges a result"
        found.append(SettingProblem(("evaluation", "every"), what))
    found += _stops_early(values.limit.early_stopping, evaluations)
    found += _plateaus(values.schedule, evaluations)
    for number, stage in enumerate(values.model.unfreeze):
        if length.epochs is not None and stage.epoch > math.ceil(length.epochs):
            key = ("model", "unfreeze", str(number), "epoch")
            found.append(SettingProblem(key, f"{stage.epoch} is after the run's last epoch"))
    spike = values.divergence.spike
    if spike is not None and length.steps is not None and spike.window >= length.steps:
        what = f"{spike.window} losses, and {whole}: no jump is ever judged"
        found.append(SettingProblem(("divergence", "spike", "window"), what))
    found += _loader(values.data.loader, processes)
    found += _preparing(builder.components)
    _refuse(found, builder.where)
    yield from (f"{'.'.join(finding.key)}: {finding.what}" for finding in found)


def _preparing(components: Components) -> Iterator[SettingProblem]:
    for name in ("validation", "test"):
        reader = components.find("data", name)
        if reader is not None and (lacking := lacking_arguments(reader, components.of("data", "train"))):
            what = f"has no {', '.join(lacking)}, which data.train has: its samples are prepared in another way"
            yield SettingProblem(reader.key, what)


def check_changed_settings(builder: Builder) -> None:
    """Refuse what may have been changed when a run is resumed, and cannot be meant: what 'min' and 'max' say.

    Raises:
        ConfigurationError: all together; alike on every rank.
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
    """Drive the schedule through the run, on a stand-in for the optimizer."""
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
            return  # a class of the user's own may need the optimizer itself, and raises when it is stepped
        yield SettingProblem(key, f"{name} raised {described(error)}", refused=True)
        return
    for rates in curve.rates:
        negative = next((step for step, rate in enumerate(rates, 1) if rate < 0), None)
        if negative is not None:
            yield SettingProblem(
                key,
                f"{name} makes the rate {rates[negative - 1]:.3g} at step {negative}; it must not be negative",
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
                key, f"{name} never changes the rate: the run has {steps:,} steps; see schedule.interval"
            )
    elif section is not None:
        full = max(float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups)
        if highest[-1] > _MOST_GROWTH * full:
            yield SettingProblem(
                key, f"{name} makes the rate grow from {full:.3g} to {highest[-1]:.3g} at the run's end"
            )
        yield from _shape(key, name, highest, steps, warmup=section.warmup_steps)


def _shape(key: tuple[str, ...], name: str, rates: list[float], steps: int, *, warmup: int) -> Iterator[SettingProblem]:
    last = max(step for step, rate in enumerate(rates, 1) if rate > 0)
    if steps - last > max(1, steps // 20):
        yield SettingProblem(
            key, f"{name} makes the rate 0 after step {last:,} of {steps:,}: nothing is trained from there on"
        )
    begun = min(warmup, steps - 1)  # a warm-up rises by intention
    lowest = rates.index(min(rates[begun:]), begun)
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
            continue  # a class of the user's own may mean anything by such names
        rate, decay = (default_of(made, args, name) for name in ("lr", "weight_decay"))
        for name, wrong, what, refused in (
            ("lr", _number(args.get("lr")) < 0, "is {}: it must not be negative", True),
            ("momentum", _number(args.get("momentum")) >= 1, "is {}: from 1 on the update grows without end", True),
            ("momentum", _number(args.get("momentum")) < 0, "is {}: it must not be negative", True),
            ("weight_decay", _number(args.get("weight_decay")) < 0, "is {}: weights would grow", True),
            ("eps", args.get("eps") == 0, "is 0: a parameter whose gradient is zero becomes NaN", False),
            ("maximize", args.get("maximize") is True, "is true: the loss is made as large as possible", False),
            ("weight_decay", class_name(target) == "AdamW" and _number(rate) * _number(decay) >= 1,
             "is {}, times the rate " + f"{rate}: each update takes all of a weight away, or more", True),
        ):  # fmt: skip
            if wrong and name not in named:
                named.add(name)
                yield SettingProblem((*key, "args", name), what.format(args.get(name, decay)), refused)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def _groups(groups: Sequence[GroupSection], module: TrainingModule) -> Iterator[SettingProblem]:
    """Compare each group with those before it, which take what they match."""
    names = [name.removeprefix("model.") for name, _ in module.named_parameters()]
    for number, group in enumerate(groups):
        own = [name for name in names if matches(name, group.match)]
        before = {name: n for n in reversed(range(number)) for name in own if matches(name, groups[n].match)}
        key = ("optimizer", "groups", str(number), "match")
        if own and len(before) == len(own):
            yield SettingProblem(
                key, f"all that it matches is in optimizer.groups.{min(before.values())} already", refused=True
            )
        elif before:
            name, first = next(iter(before.items()))
            others = f" and {len(before) - 1} more" if len(before) > 1 else ""
            yield SettingProblem(
                key, f"{name}{others} is also matched by optimizer.groups.{first}, which comes first and has it"
            )


def _directions_of(builder: Builder) -> list[SettingProblem]:
    values = builder.values
    asked = _asked(values.checkpoint.best, values.limit.early_stopping, values.schedule)
    return [*_directions(asked, builder.metrics(), losses={"loss", *values.objective.losses})] if asked else []


def _asked(
    best: Sequence[BestSection], stopping: EarlyStoppingSection | None, schedule: ScheduleSection | None
) -> list[tuple[tuple[str, ...], str, str]]:
    """Return each 'min' and 'max' with its key and the result that is watched."""
    asked: list[tuple[tuple[str, ...], str, str]]
    asked = [(("checkpoint", "best", str(n), "mode"), b.metric, b.mode) for n, b in enumerate(best)]
    if stopping is not None:
        asked.append((("limit", "early_stopping", "mode"), stopping.metric, stopping.mode))
    if schedule is not None and schedule.monitor is not None:
        asked.append((("schedule", "args", "mode"), schedule.monitor, schedule.args.get("mode", "min")))
    return asked


def _directions(
    asked: Iterable[tuple[tuple[str, ...], str, str]], metrics: Mapping[str, Metric], *, losses: Container[str]
) -> Iterator[SettingProblem]:
    """Compare each 'min' and 'max' with what is better by the result that is watched.

    Args:
        losses: names of results of which less is better.
    """
    for key, result, mode in asked:
        better = "min" if result.partition("/")[0] in losses else None
        if result in metrics and metrics[result].higher_is_better is not None:
            better = "max" if metrics[result].higher_is_better else "min"
        if better is not None and mode != better:
            word = {"min": "lower", "max": "higher"}[better]
            yield SettingProblem(
                key, f"is {mode}, but {word} is better of {result!r}: write mode: {better}", refused=True
            )
        elif better is None and mode == "min" and any(word in result.lower() for word in _HIGHER_IS_BETTER):
            yield SettingProblem(key, f"is min, and higher is better of most results that are called like {result!r}")


def _warms_up_in_time(section: ScheduleSection | None, length: RunLength, whole: str) -> Iterator[SettingProblem]:
    warmup = section.warmup_steps if section is not None else 0
    if length.steps is not None and warmup > length.steps:
        what = f"{warmup:,} updates, and {whole}: the rate never reaches its full height"
        yield SettingProblem(("schedule", "warmup_steps"), what)


def _stops_early(section: EarlyStoppingSection | None, evaluations: int | None) -> Iterator[SettingProblem]:
    if section is not None and evaluations is not None and evaluations <= section.patience:
        what = f"{section.patience} evaluations, and the run has {evaluations}: it can never stop early"
        yield SettingProblem(("limit", "early_stopping", "patience"), what)


def _plateaus(section: ScheduleSection | None, evaluations: int | None) -> Iterator[SettingProblem]:
    """Look at a schedule that follows evaluations."""
    if section is None or not section.watches:
        return
    if _number(section.args.get("factor")) <= 0:
        what = f"is {section.args['factor']}: the rate would be 0 once {section.monitor} no longer improves"
        yield SettingProblem(("schedule", "args", "factor"), what, refused=True)
    if evaluations is not None:
        patience = section.args.get("patience", 10)
        if isinstance(patience, int) and evaluations <= patience:
            what = f"{patience} evaluations, and the run has {evaluations}: the rate is never lowered"
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
        what = f"{section.start} is not before the end of the run, so nothing would be averaged; {whole}"
        yield SettingProblem(("averaging", "start"), what, refused=True)
    elif length.steps // every == start // every:
        what = f"weights would be taken in after each {section.interval}, which never comes: {whole}"
        yield SettingProblem(("averaging", "every"), what)
    elif section.anneal is not None:
        anneal = section.anneal.steps or (section.anneal.epochs or 0) * (length.steps_per_epoch or 0)
        if anneal > length.steps - start:
            yield SettingProblem(
                ("averaging", "anneal"),
                f"is longer than what is left of the run: {section.learning_rate} is not reached",
            )


def _loader(loader: LoaderSection, processes: int) -> Iterator[SettingProblem]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if loader.num_workers * processes > 4 * cores:
        each = f" for each of {processes} processes" if processes > 1 else ""
        yield SettingProblem(
            ("data", "loader", "num_workers"),
            f"{loader.num_workers} workers{each} on {cores} cores: they take time from each other",
        )
