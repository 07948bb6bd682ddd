"""Dry run: data and model are built on the CPU, nothing is trained or written."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.optim import Optimizer

from runtime.build.builder import Builder
from runtime.build.component import Component
from runtime.build.components import check_components
from runtime.build.optimizer import parameter_groups
from runtime.build.schedule import ScheduleBuilder
from runtime.build.sources import DataSources
from runtime.checks.objective import deviations, judged, sets_of
from runtime.checks.settings import check_settings
from runtime.checks.traces import left_as_it_was
from runtime.commands.learning_rate_curve import drawn, save_picture
from runtime.config import yaml_file
from runtime.config.data import BatchSection, DataSection
from runtime.config.file import LoadedConfiguration
from runtime.config.learning import AnnealSection, AveragingSection, ObjectiveSection
from runtime.config.sections import LimitSection, RunConfiguration
from runtime.data.batches import default_slots
from runtime.data.training_data import TrainingData
from runtime.determinism import default_determinism
from runtime.errors import ConfigurationError, DataError, ForwardError, ObjectiveError, Problem
from runtime.evaluation.metrics import MetricSet
from runtime.losses.weighted_sum import WeightedSum
from runtime.objective import Objective, TrainingModule, describe
from runtime.optimization.averaging import batch_norms
from runtime.optimization.combined import members
from runtime.optimization.freezing import Freezing
from runtime.optimization.optimizer import default_rate
from runtime.optimization.planned_rates import PlannedRates, simulate
from runtime.optimization.rehearsal import StandIn
from runtime.randomness import preserved_random_state
from runtime.reporting.facts import inexact_choices
from runtime.strategies.exact_cost import exact_cost
from runtime.wording import in_units

_CPU = torch.device("cpu")
_LISTED = 12  # parameters, from each end
_UNKNOWN_END = "the number of steps is unknown until the stream ends"


def show(
    loaded: LoadedConfiguration, processes: int, *, picture: Path | None = None, all_parameters: bool = False
) -> None:
    """Print what a configuration means for a number of processes.

    Args:
        picture: file to draw the learning-rate curve to.
        all_parameters: list every parameter.

    Raises:
        LockstepError: the configuration or the data is wrong.
    """
    check_components(loaded)
    values, builder = loaded.values, Builder(loaded)
    console = Console(highlight=False, soft_wrap=True)
    data = builder.training_data()
    if data.steps_per_epoch == 0:
        raise DataError("data.train: drop_last leaves no global batch; it has fewer samples than batch.global_size")
    model = builder.model()
    weights = builder.pretrained(model)
    builder.rebuild_blocks(model)
    module = TrainingModule(model, builder.objective())
    freezing = builder.freezing(module)
    freezing.unfreeze_all()
    slots = values.batch.slots or default_slots(values.batch.global_size, values.batch.largest_slot, processes)
    remarks: list[str] = []
    if values.checks == "on":
        remarks += [*_forward_pass(module, data), *_additivity(builder, module, data, slots=slots)]
    optimizer = builder.optimizer(module)
    if values.checks == "on":
        stand_in = StandIn(optimizer)
        schedule = builder.schedule.build(stand_in, builder.schedule.length(data))
        remarks += check_settings(builder, module, stand_in, schedule, data, processes=processes)
    groups = [*_groups(builder.components.of("optimizer"), module, optimizer)]
    groups += filter(None, [default_rate(values.optimizer, loaded.code)])

    console.print(f"[bold]{loaded.name}[/]: resolved values", style="")
    console.print(yaml_file.dump(loaded.resolved()).rstrip(), markup=False)
    state = builder.state_bytes(module, optimizer, processes)
    memory = [("state", str(state)), *_metric_state(MetricSet(builder.metrics(), _CPU))]
    total = _total_steps(values.limit, data)
    curve = _curve(builder.schedule, optimizer, data, total)
    unit = "samples" if values.data.unit == "samples" else "yielded batch"
    held_out = _held_out(values.data, builder.sources)
    table = Table(show_header=False, box=None, padding=(0, 2))
    for label, text in (
        *_steps(values.data, values.batch.global_size, values.limit, data, held_out),
        ("a sample", f"{describe(data.first_batch(1))} (a batch of one)")
        if values.data.unit == "samples"
        else ("a batch", f"{describe(data.first_batch(1))} (as the stream yields it)"),
        *_slots(values.batch, slots, processes, unit=unit),
        *memory,
        ("loss", "\n".join(_losses(values.objective, module.objective))),
        ("learning rate", "\n".join(_schedule(builder.schedule, curve, draw=console.encoding.startswith("utf")))),
        *_averaging(values.averaging, module),
        ("optimizer", "\n".join(groups)),
        *([("weights", str(weights))] if weights is not None else []),
        (
            "parameters",
            "\n".join(
                _parameters(
                    module, freezing, last_epoch=values.limit.epochs, listed=None if all_parameters else _LISTED
                )
            ),
        ),
        (
            "exactness",
            "\n".join([*_any_processes(values, module, slots, processes), *_exactness(values, module, freezing)]),
        ),
        *([("warnings", "\n".join(remarks))] if remarks else []),
    ):
        table.add_row(f"[bold]{label}[/]", text)
    console.print(table)
    if picture is not None and curve is None:
        raise ConfigurationError([Problem("command line", "--curve", f"{_UNKNOWN_END}; give limit.steps")])
    if picture is not None and curve is not None:
        save_picture(curve, picture, title=f"{loaded.name}: learning rate")
        console.print(f"\nwritten: {picture}")


def _held_out(section: DataSection, sources: DataSources) -> str:
    """Return how many samples are held out of the training data, as text."""
    names = ("validation", "test") if section.split is not None else ()
    parts = {name: sources.get(name) for name in names}
    return "".join(f", {len(part):,} for {name}" for name, part in parts.items() if part is not None)


def _steps(
    section: DataSection, size: int, limit: LimitSection, data: TrainingData, held_out: str
) -> Iterator[tuple[str, str]]:
    per_epoch, num_samples = data.steps_per_epoch, data.num_samples
    total = _total_steps(limit, data)
    if per_epoch is None or num_samples is None:
        yield "data", "a stream, of unknown length"
        yield "steps", f"{total:,} in all" if total else f"those of {limit.epochs} passes over the stream"
        return
    yield "data", f"{num_samples:,} training samples{held_out}"
    yield (
        "steps",
        f"{per_epoch:,} per epoch, {total:,} in all"
        + (f" ({(total or 0) / per_epoch:.1f} epochs)" if limit.steps else ""),
    )
    last = data.smallest_batch if per_epoch else 0
    if section.budget is not None:
        yield "smallest batch", f"{last} samples, in the first epoch; epochs may differ in steps"
    elif section.drop_last and not (section.balance or section.weights):
        yield "left out", f"{num_samples % size} samples of each epoch (data.drop_last)"
    elif last != size:
        yield "last batch", f"{last} samples, divided by its own weight"


def _total_steps(limit: LimitSection, data: TrainingData) -> int | None:
    if limit.steps or data.steps_per_epoch is None:
        return limit.steps
    return (limit.epochs or 0) * data.steps_per_epoch


def _slots(batch: BatchSection, slots: int, processes: int, *, unit: str) -> Iterator[tuple[str, str]]:
    origin = "batch.slots" if batch.slots else f"for a first start with {processes} process{'es' * (processes > 1)}"
    sizes = [batch.global_size * (k + 1) // slots - batch.global_size * k // slots for k in range(slots)]
    yield (
        "slots",
        f"K = {slots} ({origin}), {min(sizes)} to {max(sizes)} {unit} each"
        if min(sizes) != max(sizes)
        else (f"K = {slots} ({origin}), {max(sizes)} {unit} each"),
    )
    dividing = [n for n in range(1, slots + 1) if slots % n == 0]
    yield "world sizes", f"{', '.join(map(str, dividing))} divide K"
    idle = {n: 1 - slots / (n * math.ceil(slots / n)) for n in range(2, min(slots + 2, 9)) if slots % n}
    if idle:
        yield "idle share", ", ".join(f"{share:.0%} on {n}" for n, share in idle.items())
    rounds = math.ceil(slots / processes)
    yield "microbatches", f"{rounds} per step on each of {processes} process{'es' * (processes > 1)}"


def _metric_state(metrics: MetricSet) -> Iterator[tuple[str, str]]:
    if metrics:
        growing = ", ".join(
            f"{name} ({argument}: 200 would bound it)" if argument else name
            for name, argument in metrics.growing.items()
        )
        grows = f"; grows with the data: {growing}" if growing else ""
        yield "metric state", f"{in_units(metrics.state_bytes)}{grows}"


def _curve(
    builder: ScheduleBuilder, optimizer: Optimizer, data: TrainingData, total: int | None
) -> PlannedRates | None:
    """Simulate the schedule; return None if the number of steps is unknown. The optimizer must not be used afterwards."""
    if total is None:
        return None
    per_epoch, schedule = data.steps_per_epoch, builder.build(optimizer, builder.length(data))
    curve = simulate(schedule, steps=total, steps_per_epoch=per_epoch)
    section, averaging = builder.section, builder.averaging
    if section is not None and section.warmup_steps:
        curve.marks[section.warmup_steps] = "warmed up"
    if averaging is not None and averaging.start is not None:
        start = averaging.start
        at = start.count * (per_epoch or total + 1) if start.unit == "epoch" else start.count
        curve.marks[at] = "averaging begins"
    curve.marks = {step: what for step, what in curve.marks.items() if step <= len(curve.rates[0])}
    return curve


def _schedule(builder: ScheduleBuilder, curve: PlannedRates | None, *, draw: bool) -> Iterator[str]:
    section, averaging = builder.section, builder.averaging
    intervals = {"step": "each applied update", "epoch": "each epoch"}
    if section is None:
        yield "constant"
    else:
        warmed = f" after a linear warm-up of {section.warmup_steps:,} updates" if section.warmup_steps else ""
        when = "each evaluation" if section.watches else intervals[section.interval]
        yield (f"{section.target}, stepped after {when}" if section.target else "constant") + warmed
    if averaging is not None and averaging.learning_rate is not None:
        anneal = averaging.anneal or AnnealSection(epochs=10)
        length = f"{anneal.epochs or anneal.steps} {'epochs' if anneal.epochs else 'updates'}"
        yield f"after {averaging.start}: to {averaging.learning_rate:.3g} over {length} ({anneal.strategy}), and constant"
    if curve is None:
        yield f"({_UNKNOWN_END})"
        return
    for rates, groups in zip(curve.rates, curve.groups, strict=True):
        several = f"{groups} parameter group{'s' * (groups > 1)}: " if len(curve.rates) > 1 else ""
        highest = max(rates)
        at = "" if min(rates) == highest else f", highest {highest:.3g} at step {rates.index(highest) + 1:,}"
        yield f"{several}first {rates[0]:.3g}{at}, last {rates[-1]:.3g}"
    if draw:
        yield ""
        yield from drawn(curve)
    if section is not None and section.watches:
        yield f"(drawn as if {section.monitor} never stopped improving; the rate is multiplied by 'factor' when it does)"
    if curve.total > len(curve.rates[0]):
        yield f"(the first {len(curve.rates[0]):,} of {curve.total:,} steps)"
    if builder.follows_limit:
        yield "its length follows from the limit, which therefore cannot be raised later"


def _averaging(section: AveragingSection | None, module: nn.Module) -> Iterator[tuple[str, str]]:
    if section is None:
        return
    unit = "update" if section.interval.unit == "step" else "epoch"
    interval = f"each {unit}" if section.interval.count == 1 else f"every {section.interval.count} {unit}s"
    start = section.start
    begin = f", from {'update' if start.unit == 'step' else 'epoch'} {start.count + 1:,} on" if start else ""
    warm = ", less at first" if section.warmup else ""
    what = "mean of the weights" if section.kind == "swa" else f"exponential average (decay {section.ema_decay}{warm})"
    lines = [f"{what} after {interval}{begin}; {'it is' if section.evaluate else 'the raw weights are'} evaluated"]
    if section.kind == "swa" and batch_norms(module):
        when = "before each evaluation of it and " if section.evaluate else ""
        lines.append(f"its BatchNorm statistics need a forward pass over the training data, {when}at the end")
    yield "averaging", "\n".join(lines)


def _forward_pass(module: TrainingModule, data: TrainingData) -> Iterator[str]:
    """Yield errors of a forward pass on one sample; what needs another device than the CPU is checked at the start."""
    with torch.no_grad(), preserved_random_state(_CPU), left_as_it_was(module, training=False):
        try:
            module(data.first_batch(1))
        except (ForwardError, ObjectiveError) as error:
            yield f"on this CPU: {error}"
        except Exception:  # the start checks again, on its device
            return


def _additivity(builder: Builder, module: TrainingModule, data: TrainingData, *, slots: int) -> Iterator[str]:
    """Check the objective as a first start does, on the CPU; skipped if the data cannot be read here."""
    if module.objective.couples_samples:
        return
    values = builder.values
    try:
        sets = sets_of(data, slots=slots, size=values.batch.global_size)
    except DataError:
        return
    if sets is not None:
        measured = deviations(module, sets, device=_CPU, compiled=values.compile is not None)
        yield from judged(values.objective, module.objective, measured, builder.where)


def _losses(section: ObjectiveSection, objective: Objective) -> Iterator[str]:
    """Yield what each loss sum is divided by."""
    parts = objective.parts if isinstance(objective, WeightedSum) else {section.target or "": objective}
    for name, part in parts.items():
        entry = section.losses.get(name)
        what = f"{entry.weight:g} x {name} ({entry.target})" if entry is not None else name
        weighted = f", each counting its weight (data.fields.weight: {part.fields.weight})" * (
            part.fields.weight is not None
        )
        yield f"{what}: the sum over the global batch / its {part.unit}{weighted}"


def _groups(bound: Component, module: TrainingModule, optimizer: Optimizer) -> Iterator[str]:
    """Yield one line for each parameter group, in the order of a scheduler's lists."""
    labelled = iter(parameter_groups(bound, module))
    for member in members(optimizer):
        yield type(member).__name__
        for group in member.param_groups:
            label, size = next(labelled).label, sum(p.numel() for p in group["params"])
            decay = f"weight decay {group['weight_decay']:.3g}" if "weight_decay" in group else "no weight decay"
            yield f"  {label}: {size:,} parameters, lr {float(group['lr']):.3g}, {decay}"


def _parameters(
    module: TrainingModule, freezing: Freezing, *, last_epoch: int | None, listed: int | None
) -> Iterator[str]:
    """Yield one line per number of trainable parameters, then one per parameter: the first and last ``listed``."""
    for epoch in (0, *freezing.epochs):
        freezing.apply(epoch)
        trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
        frozen = sum(p.numel() for p in module.parameters()) - trainable
        reached = last_epoch is None or epoch < last_epoch
        from_here = (
            f" from epoch {epoch + 1} on{'' if reached else ' (which limit.epochs does not reach)'}" if epoch else ""
        )
        yield f"{trainable:,} trainable, {frozen:,} frozen{from_here}"
    freezing.apply(0)
    named = list(module.named_parameters())
    for number, (full, parameter) in enumerate(named):
        if listed is not None and listed <= number < len(named) - listed:
            if number == listed:
                yield f"  … {len(named) - 2 * listed} more (lockstep show --parameters)"
            continue
        name, shape = full.removeprefix("model."), " x ".join(map(str, parameter.shape)) or "scalar"
        since = freezing.trained_from(name)
        until = "" if math.isinf(since) else f" until epoch {since:g}"
        yield f"  {name}  {shape}" + ("" if parameter.requires_grad else f"  (frozen{until})")


def _any_processes(values: RunConfiguration, module: nn.Module, slots: int, processes: int) -> Iterator[str]:
    """Yield what ``determinism: exact`` promises and what it costs."""
    if values.determinism != "exact":
        return
    cost = exact_cost(values.strategy, module, slots=slots, processes=processes)
    text = f"determinism exact: the same bits on any number of processes with batch.slots: {slots}"
    if cost.held:
        text += f"; up to {in_units(cost.held)} for sums of gradients per process"
    if cost.sent:
        text += f"; a step sends {in_units(cost.sent)} of gradients per process"
    yield text


def _exactness(values: RunConfiguration, module: TrainingModule, freezing: Freezing) -> Iterator[str]:
    inexact = inexact_choices(values, module.objective)
    yield from inexact
    freezing.unfreeze_all()
    module.train()
    names = {
        type(part).__name__
        for part in module.modules()
        if isinstance(part, nn.modules.batchnorm._BatchNorm)
        and part.training  # a frozen one's statistics do not change
    }
    if names:
        yield f"{', '.join(sorted(names))}: statistics are per slot, so the result depends on K"
    if any(isinstance(part, nn.modules.dropout._DropoutNd) and part.p > 0 for part in module.modules()):
        yield "dropout: masks are drawn per slot, so the result depends on K and on the kind of device"
    if (values.determinism or default_determinism()) == "fast":
        yield "determinism fast (this machine's default or the YAML): a resumed run is equal up to rounding, not bit for bit"
    if not inexact and not names:
        yield "beyond rounding, nothing else depends on K, the world size or the kind of device"
