"""What a run will be, without running it: data and model are built on the CPU, nothing is trained or written."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.optim import Optimizer

from runtime import assembly, yaml_file
from runtime.batches import default_slots
from runtime.combined import members
from runtime.config_file import LoadedConfiguration
from runtime.determinism import default_determinism
from runtime.evaluation_weights import begin_training
from runtime.facts import inexact_choices
from runtime.freezing import Freezing
from runtime.metrics import MetricSet
from runtime.objective import Objective, TrainingModule
from runtime.training_data import TrainingData
from runtime.weighted_sum import WeightedSum

_CPU = torch.device("cpu")
_SIMULATED_STEPS = 100_000
_RATES = 8


def show(loaded: LoadedConfiguration, processes: int) -> None:
    """Print what a configuration means for a number of processes.

    Raises:
        LockstepError: the configuration or the data is wrong.
    """
    assembly.check_components(loaded)
    console = Console(highlight=False, soft_wrap=True)
    data = assembly.build_training_data(loaded)
    model = assembly.build_model(loaded)
    weights = assembly.load_pretrained(loaded, model)
    module = TrainingModule(model, assembly.build_objective(loaded))
    freezing = assembly.build_freezing(loaded, module)
    freezing.unfreeze_all()
    optimizer = assembly.build_optimizer(loaded, module)
    groups = list(_groups(loaded, module, optimizer))

    console.print(f"[bold]{loaded.name}[/]: resolved values", style="")
    console.print(yaml_file.dump(loaded.resolved()).rstrip(), markup=False)
    table = Table(show_header=False, box=None, padding=(0, 2))
    for label, text in (
        *_steps(loaded, data),
        *_slots(loaded, processes),
        *_memory(loaded, module, optimizer),
        ("loss", "\n".join(_losses(loaded, module.objective))),
        ("learning rate", "\n".join(_rates(loaded, optimizer, data))),
        ("optimizer", "\n".join(groups)),
        *([("weights", str(weights))] if weights is not None else []),
        ("parameters", "\n".join(_parameters(loaded, module, freezing))),
        ("exactness", "\n".join(_promises(loaded, module))),
    ):
        table.add_row(f"[bold]{label}[/]", text)
    console.print(table)


def _steps(loaded: LoadedConfiguration, data: TrainingData) -> Iterator[tuple[str, str]]:
    limit, size = loaded.values.limit, loaded.values.batch.global_size
    per_epoch, num_samples = data.steps_per_epoch, data.num_samples
    total = _total_steps(loaded, data)
    if per_epoch is None or num_samples is None:
        yield "data", "a stream: its length shows when it ends"
        yield "steps", f"{total:,} in all" if total else f"as many as {limit.epochs} passes over the stream have"
        return
    yield "data", f"{num_samples:,} training samples"
    yield (
        "steps",
        f"{per_epoch:,} per epoch, {total:,} in all"
        + (f" ({(total or 0) / per_epoch:.1f} epochs)" if limit.steps else ""),
    )
    last = data.smallest_batch if per_epoch else 0
    if loaded.values.data.drop_last:
        yield "left out", f"{num_samples % size} samples of each epoch (data.drop_last)"
    elif last != size:
        yield "last batch", f"{last} samples, divided by their own weight"


def _total_steps(loaded: LoadedConfiguration, data: TrainingData) -> int | None:
    limit = loaded.values.limit
    if limit.steps or data.steps_per_epoch is None:
        return limit.steps
    return (limit.epochs or 0) * data.steps_per_epoch


def _slots(loaded: LoadedConfiguration, processes: int) -> Iterator[tuple[str, str]]:
    batch = loaded.values.batch
    slots = batch.slots or default_slots(batch.global_size, batch.largest_slot, processes)
    origin = "batch.slots" if batch.slots else f"for a first start with {processes} process{'es' * (processes > 1)}"
    sizes = [batch.global_size * (k + 1) // slots - batch.global_size * k // slots for k in range(slots)]
    yield (
        "slots",
        f"K = {slots} ({origin}), {min(sizes)} to {max(sizes)} samples each"
        if min(sizes) != max(sizes)
        else (f"K = {slots} ({origin}), {max(sizes)} samples each"),
    )
    dividing = [n for n in range(1, slots + 1) if slots % n == 0]
    yield "world sizes", f"{', '.join(map(str, dividing))} divide K"
    idle = {n: 1 - slots / (n * math.ceil(slots / n)) for n in range(2, min(slots + 2, 9)) if slots % n}
    if idle:
        yield "idle share", ", ".join(f"{share:.0%} on {n}" for n, share in idle.items())
    rounds = math.ceil(slots / processes)
    yield "microbatches", f"{rounds} per step on each of {processes} process{'es' * (processes > 1)}"


def _memory(loaded: LoadedConfiguration, module: nn.Module, optimizer: Optimizer) -> Iterator[tuple[str, str]]:
    trainable = [p for p in module.parameters() if p.requires_grad]
    parameter_bytes = sum(p.nbytes for p in module.parameters())
    gradient_bytes = sum(p.nbytes for p in trainable)
    buffer_bytes = sum(b.nbytes for b in module.buffers())
    yield (
        "state",
        (
            f"{_bytes(parameter_bytes)} parameters, {_bytes(gradient_bytes)} gradients, {_bytes(buffer_bytes)} buffers, "
            f"{_optimizer_bytes(optimizer)} optimizer, on each process"
        ),
    )
    metrics = MetricSet(assembly.build_metrics(loaded), _CPU)
    if metrics:
        growing = f"; grows with the data: {', '.join(metrics.growing)}" if metrics.growing else ""
        yield "metric state", f"{_bytes(metrics.state_bytes)}{growing}"


def _optimizer_bytes(optimizer: Optimizer) -> str:
    """Measure the state after one step of zero gradients; the model is not used afterwards."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    try:
        begin_training(optimizer)
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    except Exception:  # an optimizer of the user's may want a closure
        return "unknown"
    states = [state for member in members(optimizer) for state in member.state.values()]
    tensors = [t for state in states for t in state.values() if isinstance(t, torch.Tensor)]
    optimizer.zero_grad(set_to_none=True)
    return _bytes(sum(t.nbytes for t in tensors))


def _rates(loaded: LoadedConfiguration, optimizer: Optimizer, data: TrainingData) -> Iterator[str]:
    schedule = loaded.values.schedule
    per_epoch, total = data.steps_per_epoch, _total_steps(loaded, data)
    simulated = assembly.build_schedule(loaded, optimizer, assembly.schedule_length(loaded, per_epoch))
    if schedule is None or schedule.monitor:
        yield f"{simulated.learning_rates[0]:.3g}" + (f", until {schedule.monitor} stops improving" if schedule else "")
        return
    if total is None:
        yield f"{simulated.learning_rates[0]:.3g} at first (how many steps there are shows when the stream ends)"
        return
    steps = min(total, _SIMULATED_STEPS)
    wanted = {round(i * (steps - 1) / (_RATES - 1)) for i in range(_RATES)} | {min(schedule.warmup_steps, steps - 1)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch misses the optimizer's steps
        for step in range(steps):
            if step in wanted:
                yield f"step {step + 1:>8,}  {simulated.learning_rates[0]:.3e}"
            simulated.after_update()
            if per_epoch and (step + 1) % per_epoch == 0:
                simulated.after_epoch()
    if steps < total:
        yield f"(the first {steps:,} of {total:,} steps)"
    if assembly.follows_limit(loaded):
        yield "its length follows from the limit, which then cannot be raised later"


def _losses(loaded: LoadedConfiguration, objective: Objective) -> Iterator[str]:
    """Say what each loss sum is divided by."""
    parts = objective.parts if isinstance(objective, WeightedSum) else {loaded.values.objective.target or "": objective}
    for name, part in parts.items():
        section = loaded.values.objective.losses.get(name)
        what = f"{section.weight:g} x {name} ({section.target})" if section is not None else name
        weighed = f", each counting its weight (data.fields.weight: {part.fields.weight})" * (
            part.fields.weight is not None
        )
        yield f"{what}: the sum over the global batch / its {part.unit}{weighed}"


def _groups(loaded: LoadedConfiguration, module: TrainingModule, optimizer: Optimizer) -> Iterator[str]:
    """One line for each parameter group, in the order of a scheduler's lists."""
    labelled = iter(assembly.parameter_groups(loaded, module))
    for member in members(optimizer):
        yield type(member).__name__
        for group in member.param_groups:
            label, size = next(labelled).label, sum(p.numel() for p in group["params"])
            decay = f"weight decay {group['weight_decay']:.3g}" if "weight_decay" in group else "no weight decay"
            yield f"  {label}: {size:,} parameters, lr {float(group['lr']):.3g}, {decay}"


def _parameters(loaded: LoadedConfiguration, module: TrainingModule, freezing: Freezing) -> Iterator[str]:
    for epoch in (0, *freezing.epochs):
        freezing.apply(epoch)
        trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
        frozen = sum(p.numel() for p in module.parameters()) - trainable
        reached = loaded.values.limit.epochs is None or epoch < loaded.values.limit.epochs
        from_here = (
            f" from epoch {epoch + 1} on{'' if reached else ' (which limit.epochs does not reach)'}" if epoch else ""
        )
        yield f"{trainable:,} trainable, {frozen:,} frozen{from_here}"
    freezing.apply(0)
    for full, parameter in module.named_parameters():
        name, shape = full.removeprefix("model."), " x ".join(map(str, parameter.shape)) or "scalar"
        since = freezing.trained_from(name)
        until = "" if math.isinf(since) else f" until epoch {since:g}"
        yield f"  {name}  {shape}" + ("" if parameter.requires_grad else f"  (frozen{until})")


def _promises(loaded: LoadedConfiguration, module: TrainingModule) -> Iterator[str]:
    found = inexact_choices(loaded, module.objective)
    yield from found
    names = {type(part).__name__ for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)}
    if names:
        yield f"{', '.join(sorted(names))}: statistics are those of a slot, so the result depends on K"
    if any(isinstance(part, nn.modules.dropout._DropoutNd) and part.p > 0 for part in module.modules()):
        yield "dropout: masks are drawn per slot, so the result depends on K and on the kind of device"
    if (loaded.values.determinism or default_determinism()) == "fast":
        yield "determinism fast (this machine's default or the YAML): a resumed run is equal to rounding, not bit for bit"
    if not found and not names:
        yield "nothing else depends on K, the world size or the kind of device, beyond rounding"


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
