"""Builds the parts of a run from a checked configuration, in order of dependence and equally on every rank."""

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
from runtime.distributed.collectives import sum_by_name
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
from runtime.strategies.state_size import StateBytes
from runtime.training.divergence import Divergence
from runtime.training.early_stopping import EarlyStopping
from runtime.training.fitting import fitting_micro_size
from runtime.training.progress import Progress

_PER_RANK_KEYS = ("code", "data.loader.", "output", "reporting.progress", "reporting.wandb")  # may differ between ranks


@dataclass(frozen=True)
class RunComponents:
    """The parts of a run before its first step.

    Args:
        contents: digests of a few samples of all data.
        groups: names of the optimizer's parameter groups.
        parameters: numbers of trained and of frozen elements.
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
    log: Callable[[str], None],
) -> RunComponents:
    """Build a run's parts, with module and optimizer prepared by the strategy. Collective: every rank must call this.

    Args:
        stored: training state of the checkpoint to resume from; its identity must match, and its progress determines which
            parameters are trainable.
        warn: called with a warning about each loss of exactness.
        log: called with a report of the pretrained weights.

    Raises:
        LockstepError: the configuration or data is wrong, or the ranks differ.
    """
    values = loaded.values
    weights = pretrained_digest(values.model.weights, loaded.where)
    module = build_module(builder, strategy, log=log if stored is None else None)
    refuse_extra_state(module, loaded.where)
    buffers = BufferState(module)
    freezing = builder.freezing(module)
    freezing.unfreeze_all()  # the optimizer and the memory estimate cover all parameters that are ever trained
    data = builder.training_data()
    data_fingerprint = data.fingerprint((strategy.world_size, values.data.loader.num_workers))
    seen = {"a run folder shared with rank 0": _sees_run_folder(loaded.output)} if strategy.world_size > 1 else {}
    resolved = loaded.resolved()
    extra = {"the weights of model.weights": weights, **seen}
    compare_ranks(strategy, module, data_fingerprint, extra, configuration=resolved, code=loaded.code)
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
    memory = builder.state_bytes(module, optimizer, strategy.world_size)
    parameters = _trained_and_frozen(module)  # before the strategy shards them
    strategy.prepare(module, optimizer, slots=assignment.slots)
    averaging = builder.averaging(strategy)
    divergence = Divergence(
        values.divergence,
        sum_over_ranks=lambda losses: sum_by_name({"loss": losses}, strategy.device)["loss"],
        warn=warn,
    )
    stopping = values.limit.early_stopping
    early_stopping = EarlyStopping(stopping) if stopping is not None else None
    state = RunState(
        module, optimizer, schedule, averaging, strategy, divergence, early_stopping, progress, built, buffers
    )
    return RunComponents(data, contents, fingerprint, assignment, state, freezing, groups, parameters, memory)


def raise_component_error(components: Components, error: Exception, state: RunState) -> None:
    """Reraise an error of the schedule, or of the optimizer's first update, at its section's key; ignore any other error.

    Raises:
        ConfigurationError: the error came from one of these.
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
    """Refuse synchronised BatchNorm if a rank would run a filler, whose samples would enter the others' statistics."""
    if assignment.slots % assignment.world_size or smallest_batch < assignment.slots:
        raise where.error(
            ("batch_norm",),
            "sync needs a real slot on every rank in every forward pass: use a world size that divides batch.slots "
            f"(now {assignment.slots}), and set data.drop_last if an epoch's last batch (now {smallest_batch} samples) is "
            "smaller",
        )


@dataclass(frozen=True)
class _FirstStart:
    """Inputs for choosing the number of slots at a first start, and for the fingerprint of data and weights.

    Args:
        schedule_length: if it is derived from the limit, otherwise None.
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
    log: Callable[[str], None] | None = None,
) -> TrainingModule:
    """Build model and objective, placed by the strategy.

    Args:
        training: otherwise BatchNorm is not synchronised, and needs no GPUs.
        log: at a first start, called with a report of the pretrained weights.
    """
    values = builder.values
    model, objective = builder.model(), builder.objective()
    if training:
        refuse_sparse(builder.components.of("model"), model)
    report = builder.pretrained(model) if log is not None else None
    if log is not None and report is not None:
        log(str(report))
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
    extra: Mapping[str, Any] | None = None,
    *,
    configuration: Mapping[str, Any],
    code: Path,
) -> None:
    """Refuse ranks that were started differently. Collective: every rank must call this.

    Args:
        data: fingerprint of the data.
        extra: other facts that must be equal.
        configuration: all keys with their values.
        code: the folder of the user's own modules.

    Raises:
        RanksDifferError: naming the rank and the difference.
    """
    # Free keys too: a rank that evaluates or reports at another interval would enter a collective alone.
    facts = {
        **{f"configuration {k}": v for k, v in flatten(configuration).items() if not k.startswith(_PER_RANK_KEYS)},
        **versions(),
        "code": code_digest(code),
        "data": dict(data),
        "parameter shapes": shapes(module),
        **(extra or {}),
    }
    # A rank may have imported modules that others have not (yet): for example, only rank 0 draws figures.
    files = loaded_code(code, configuration)["files"]
    imported = {f"the code of {name}": digest for name, digest in files.items()}
    compare(facts, if_known=imported, host=socket.gethostname(), device=strategy.device)


def _sees_run_folder(folder: Path) -> bool:
    """Return whether this rank sees rank 0's lock in the run folder; waits, since a file server may be slow."""
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
        warn("model.weights: the file has changed, without effect: a resumed run uses its checkpoint's weights")
    threads, before = torch.get_num_threads(), stored["made_by"].get("threads")
    if strategy.device.type == "cpu" and threads != before:
        warn(
            f"{threads} threads per process, {before} before: from here on results are equal up to rounding, not bit for bit "
            "(OMP_NUM_THREADS)"
        )
    if slots != fingerprint.slots:
        warn(
            f"K changes from {fingerprint.slots} to {slots}: from here on the result stays the same only for models without "
            "randomness or batch statistics in the forward pass"
        )
    known = {**fingerprint.contents, **fresh.contents.known}
    return RunFingerprint(resolved, slots, data, length, fingerprint.tracker_id, weights or fingerprint.weights, known)


def _contents(
    builder: Builder, strategy: Strategy, data: TrainingData, stored: Mapping[str, Any] | None
) -> DataContents:
    """Read a few samples of all data, unless ``checks: off``. Collective."""
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
