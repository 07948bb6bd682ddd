"""From a checked configuration to the parts of a run, built in order of dependence and alike on every rank."""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from runtime.build.builder import Builder
from runtime.build.components import Components
from runtime.build.data_contents import DataContents, changed, contents_of
from runtime.build.model import pretrained_digest, refuse_extra_state, refuse_sparse
from runtime.build.optimizer import group_names
from runtime.checkpoints.built_state import BuiltState
from runtime.checkpoints.run_state import RunFingerprint, RunState, check_identity, slots_on_resumption
from runtime.code_digests import loaded_code
from runtime.config.component import described
from runtime.config.data import BatchSection
from runtime.config.file import LoadedConfiguration, flatten
from runtime.config.locations import Locations
from runtime.data.batches import SlotAssignment, default_slots
from runtime.data.training_data import MappedData, TrainingData
from runtime.distributed.collectives import sum_over_ranks
from runtime.distributed.rank_consistency import code_digest, compare, shapes
from runtime.errors import DataError
from runtime.objective import TrainingModule
from runtime.optimization.freezing import Freezing
from runtime.optimization.optimizer_eval_mode import begin_training
from runtime.optimization.rehearsal import raised_within
from runtime.reporting.facts import versions
from runtime.run_files import RunFiles
from runtime.state.module_buffers import BufferState
from runtime.strategies import Strategy
from runtime.strategies.memory import state_bytes
from runtime.strategies.state_size import StateBytes
from runtime.training.divergence import Divergence
from runtime.training.early_stopping import EarlyStopping
from runtime.training.fitting import fitting_micro_size
from runtime.training.progress import Progress

_OF_ONE_RANK = ("code", "data.loader.", "output", "reporting.progress", "reporting.wandb")  # may differ between ranks


@dataclass(frozen=True)
class RunComponents:
    """What a run consists of before its first step.

    Args:
        contents: what a few samples of all data hold.
        groups: names of the optimizer's parameter groups.
        parameters: how many elements of them are trained, and how many are frozen.
    """

    data: TrainingData
    contents: DataContents
    fingerprint: RunFingerprint
    assignment: SlotAssignment
    state: RunState
    freezing: Freezing
    groups: tuple[str, ...]
    parameters: tuple[int, int]
    memory: StateBytes


def prepare(
    loaded: LoadedConfiguration,
    builder: Builder,
    strategy: Strategy,
    stored: Mapping[str, Any] | None,
    *,
    warn: Callable[[str], None],
    tell: Callable[[str], None],
) -> RunComponents:
    """Build a run's parts, module and optimizer as the strategy prepares them. Collective: every rank must call this.

    Args:
        stored: training state of the checkpoint that the run goes on from; its identity is what must fit, and its progress
            says what is trainable.
        warn: told what gives up exactness.
        tell: told what became of the weights that the run starts from.

    Raises:
        LockstepError: what is wrong with configuration, data, or the ranks' agreement.
    """
    values = loaded.values
    weights = pretrained_digest(values.model.weights, loaded.where)
    module = build_module(builder, strategy, tell=tell if stored is None else None)
    refuse_extra_state(module, loaded.where)
    buffers = BufferState(module)
    freezing = builder.freezing(module)
    freezing.unfreeze_all()  # for the optimizer, which holds all that is ever trained, and for what memory must hold
    data = builder.training_data()
    told = data.fingerprint((strategy.world_size, values.data.loader.num_workers))
    seen = {"a run folder shared with rank 0": _sees_run_folder(loaded.output)} if strategy.world_size > 1 else {}
    resolved = loaded.resolved()
    more = {"the weights of model.weights": weights, **seen}
    compare_ranks(strategy, module, told, more, configuration=resolved, code=loaded.code)
    if data.steps_per_epoch == 0:
        sampler = values.data.sampler or values.data.batch_sampler
        if sampler is not None and not values.data.drop_last:
            raise DataError(f"data.train: {sampler.target} draws no samples")
        raise DataError("data.train: drop_last leaves no global batch; it has fewer samples than batch.global_size")
    length = builder.schedule.length(data)
    contents = _contents(builder, strategy, data, stored)
    fresh = _FirstStart(module, data, contents, length if builder.schedule.follows_limit else None, weights)
    fingerprint = _identity(builder, strategy, fresh, stored, warn=warn, resolved=resolved, folder=loaded.output)
    assignment = SlotAssignment(fingerprint.slots, strategy.world_size, strategy.rank)
    if values.batch_norm == "sync":
        refuse_fillers(assignment, loaded.where, smallest_batch=data.smallest_batch)
    optimizer = builder.optimizer(module)
    groups = group_names(builder.components.of("optimizer"), module, optimizer)
    begin_training(optimizer)
    freezing.apply(0)
    schedule = builder.schedule.build(optimizer, length)
    built = BuiltState.of(resolved, module, optimizer)
    progress = Progress()
    if stored is not None:
        progress.load_state_dict(stored["progress"])
    freezing.apply(progress.cursor.epoch)
    memory = state_bytes(values.strategy, module, optimizer, strategy.world_size, zero_json=builder.zero_json())
    parameters = _trained_and_frozen(module)  # of which a strategy may leave this rank a part
    strategy.prepare(module, optimizer)
    averaging = builder.averaging(strategy)
    divergence = Divergence(
        values.divergence,
        sum_over_ranks=lambda value: float(sum_over_ranks(torch.tensor(value, dtype=torch.float64), strategy.device)),
        warn=warn,
    )
    stopping = values.limit.early_stopping
    early_stopping = EarlyStopping(stopping) if stopping is not None else None
    state = RunState(
        module, optimizer, schedule, averaging, strategy, divergence, early_stopping, progress, built, buffers
    )
    return RunComponents(data, contents, fingerprint, assignment, state, freezing, groups, parameters, memory)


def tell_of_component(components: Components, error: Exception, state: RunState) -> None:
    """Raise an error of the schedule, or of the optimizer's first update, as one of its section; leave any other alone.

    Raises:
        ConfigurationError: it was one of these.
    """
    scheduler, progress = components.find("schedule"), state.progress
    if scheduler is not None and raised_within(error, state.schedule):
        component, name = scheduler, scheduler.target
    elif progress.updates == 0 and raised_within(error, state.optimizer):
        component, name = components.of("optimizer"), type(state.optimizer).__name__
    else:
        return
    raise component.error(f"{name} raised {described(error)} at step {progress.step + 1}") from error


def _trained_and_frozen(module: TrainingModule) -> tuple[int, int]:
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return trained, sum(p.numel() for p in module.parameters()) - trained


def refuse_fillers(assignment: SlotAssignment, where: Locations, *, smallest_batch: int) -> None:
    """Refuse synchronised BatchNorm where a rank would run a filler, whose samples would enter the others' statistics."""
    if assignment.slots % assignment.world_size or smallest_batch < assignment.slots:
        raise where.error(
            ("batch_norm",),
            "sync needs a real slot on every rank in every forward pass: let the world size divide batch.slots "
            f"(now {assignment.slots}), and set data.drop_last if an epoch's last batch (now {smallest_batch} samples) is "
            "smaller",
        )


@dataclass(frozen=True)
class _FirstStart:
    """What K is found with at a first start, and what identifies the data and the weights.

    Args:
        schedule_length: where it follows from the limit.
    """

    module: TrainingModule
    data: TrainingData
    contents: DataContents
    schedule_length: int | None
    weights: str | None


def build_module(
    builder: Builder,
    strategy: Strategy,
    *,
    training: bool = True,
    tell: Callable[[str], None] | None = None,
) -> TrainingModule:
    """Build model and objective, where the strategy wants them.

    Args:
        training: synchronised BatchNorm and its GPUs are for training alone.
        tell: at a first start, told what became of the weights that the model starts from.
    """
    values = builder.values
    model, objective = builder.model(), builder.objective()
    if training:
        refuse_sparse(builder.components.of("model"), model)
    report = builder.pretrained(model) if tell is not None else None
    if tell is not None and report is not None:
        tell(str(report))
    if values.batch_norm == "sync" and training:
        if strategy.device.type != "cuda":
            raise builder.where.error(("batch_norm",), "sync needs GPUs; use local")
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    if values.compile is not None and torch.are_deterministic_algorithms_enabled():
        from torch._inductor import config as inductor

        inductor.fallback_random = True  # compiled code then draws eager's random numbers
    builder.rebuild_blocks(model)
    return strategy.place(TrainingModule(model, objective))


def compare_ranks(
    strategy: Strategy,
    module: TrainingModule,
    data: Mapping[str, Any],
    more: Mapping[str, Any] | None = None,
    *,
    configuration: Mapping[str, Any],
    code: Path,
) -> None:
    """Refuse ranks that were started differently. Collective: every rank must call this.

    Args:
        data: what identifies the data.
        more: what else must be equal.
        configuration: all keys with their values.
        code: the folder of the user's own modules.

    Raises:
        RanksDifferError: naming the rank and the difference.
    """
    # Free keys as well: evaluating or reporting at another interval, a rank would enter a collective alone.
    facts = {
        **{f"configuration {k}": v for k, v in flatten(configuration).items() if not k.startswith(_OF_ONE_RANK)},
        **versions(),
        "code": code_digest(code),
        "data": dict(data),
        "parameter shapes": shapes(module),
        **(more or {}),
    }
    # A rank may have imported modules that others have not (yet): rank 0 alone draws pictures, say.
    files = loaded_code(code, configuration)["files"]
    imported = {f"the code of {name}": digest for name, digest in files.items()}
    compare(facts, if_known=imported, host=socket.gethostname(), device=strategy.device)


def _sees_run_folder(folder: Path) -> bool:
    """Tell whether this rank sees the lock that rank 0 has put into the run folder; a file server may take its time."""
    for _ in range(100):
        if RunFiles(folder).locks():
            return True
        time.sleep(0.1)
    return False


def _identity(
    builder: Builder,
    strategy: Strategy,
    fresh: _FirstStart,
    stored: Mapping[str, Any] | None,
    *,
    warn: Callable[[str], None],
    resolved: Mapping[str, Any],
    folder: Path,
) -> RunFingerprint:
    values, world_size = builder.values, strategy.world_size
    batch = values.batch
    if batch.global_size < world_size:
        what = f"{batch.global_size} {values.data.unit} cannot keep {world_size} processes busy; use fewer processes"
        raise builder.where.error(("batch", "global_size"), what)
    data = fresh.data.fingerprint((world_size, values.data.loader.num_workers))
    length, weights = fresh.schedule_length, fresh.weights
    if stored is None:
        slots = batch.slots or default_slots(batch.global_size, _micro_size(batch, strategy, fresh), world_size)
        known = fresh.contents.known
        return RunFingerprint(resolved, slots, data, length, secrets.token_hex(4), weights, known)
    fingerprint = RunFingerprint(**stored["identity"])
    differing = changed(fingerprint.contents, fresh.contents.known)
    now = RunFingerprint(resolved, fingerprint.slots, data, length, fingerprint.tracker_id, weights)
    allowed = values.resume.allow_changes
    check_identity(fingerprint, now, contents=differing, allowed=allowed, folder=folder)
    slots = slots_on_resumption(fingerprint.slots, batch, allowed=allowed, folder=folder)
    if weights is not None and weights != fingerprint.weights:
        warn("model.weights: the file's other content changes nothing: a run that goes on has its checkpoint's weights")
    threads, before = torch.get_num_threads(), stored["made_by"].get("threads")
    if strategy.device.type == "cpu" and threads != before:
        warn(
            f"{threads} threads a process, {before} before: equal to rounding from here on, not bit for bit (OMP_NUM_THREADS)"
        )
    if slots != fingerprint.slots:
        warn(
            f"K changes from {fingerprint.slots} to {slots}: from here on only models without randomness or batch statistics "
            "in the forward pass keep the answer"
        )
    known = {**fingerprint.contents, **fresh.contents.known}
    return RunFingerprint(resolved, slots, data, length, fingerprint.tracker_id, weights or fingerprint.weights, known)


def _contents(
    builder: Builder, strategy: Strategy, data: TrainingData, stored: Mapping[str, Any] | None
) -> DataContents:
    """Look at all data that the run reads, unless ``checks: off``. Collective."""
    evaluated = {name: builder.samples(name, batch_size=1) for name in ("validation", "test")}
    if builder.values.checks == "off":
        return DataContents()
    order = data.order if isinstance(data, MappedData) else None
    before = stored["identity"].get("contents", {}) if stored is not None else None
    return contents_of({"train": data.samples, **evaluated}, strategy, builder.loader, order=order, stored=before)


def _micro_size(batch: BatchSection, strategy: Strategy, fresh: _FirstStart) -> int:
    if batch.micro_size != "auto":
        return batch.largest_slot
    largest = -(-batch.global_size // strategy.world_size)
    return fitting_micro_size(fresh.module, fresh.data.first_batch, largest=largest, strategy=strategy)
