"""From a checked configuration to the parts of a run, built in order of dependence and alike on every rank."""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from runtime.build import components
from runtime.build.data_contents import Contents, changed, contents_of
from runtime.build.objective import build_objective
from runtime.build.optimizer import (
    build_freezing,
    build_optimizer,
    build_schedule,
    follows_limit,
    group_names,
    schedule_length,
)
from runtime.checkpoints.built_state import Built
from runtime.checkpoints.run_state import Identity, RunState, check_identity, slots_on_resumption
from runtime.code_digests import loaded_code
from runtime.config.component import described
from runtime.config.file import LoadedConfiguration, flatten
from runtime.data.batches import Sharing, default_slots
from runtime.data.samples import Samples
from runtime.data.streams import StreamSamples
from runtime.data.training_data import MappedData, TrainingData
from runtime.distributed.collectives import sum_over_ranks
from runtime.distributed.rank_consistency import code_digest, compare, shapes
from runtime.errors import ConfigurationError, DataError
from runtime.evaluation.batch_statistics import BatchStatistics
from runtime.evaluation.evaluator import Evaluator
from runtime.evaluation.metrics import MetricSet
from runtime.objective import TrainingModule
from runtime.optimization.averaging import WeightAverage
from runtime.optimization.freezing import Freezing
from runtime.optimization.optimizer_eval_mode import begin_training
from runtime.optimization.rehearsal import raised_within
from runtime.reporting.facts import versions
from runtime.run_files import RunFiles
from runtime.state.module_buffers import BufferState
from runtime.strategies import Strategy
from runtime.strategies.memory import state_bytes
from runtime.strategies.state_size import StateBytes
from runtime.training.averaged_evaluation import AveragedEvaluation
from runtime.training.divergence import Divergence
from runtime.training.early_stopping import EarlyStopping
from runtime.training.fitting import fitting_micro_size
from runtime.training.progress import Progress

_OF_ONE_RANK = ("code", "data.loader.", "output", "reporting.progress", "reporting.wandb")  # may differ between ranks


@dataclass(frozen=True)
class Prepared:
    """What a run consists of before its first step.

    Args:
        contents: what a few samples of all data hold.
        groups: names of the optimizer's parameter groups.
        parameters: how many elements of them are trained, and how many are frozen.
    """

    data: TrainingData
    contents: Contents
    identity: Identity
    sharing: Sharing
    state: RunState
    freezing: Freezing
    groups: tuple[str, ...]
    parameters: tuple[int, int]
    memory: StateBytes


def prepare(
    loaded: LoadedConfiguration,
    strategy: Strategy,
    stored: Mapping[str, Any] | None,
    warn: Callable[[str], None],
    tell: Callable[[str], None],
) -> Prepared:
    """Build a run's parts, module and optimizer as the strategy prepares them. Collective: every rank must call this.

    Args:
        stored: training state of the checkpoint that the run goes on from; its identity is what must fit, and its progress
            says what is trainable.
        warn: told what gives up exactness.
        tell: told what became of the weights that the run starts from.

    Raises:
        LockstepError: what is wrong with configuration, data, or the ranks' agreement.
    """
    weights = components.pretrained_digest(loaded)
    module = build_module(loaded, strategy, tell=tell if stored is None else None)
    components.refuse_extra_state(loaded, module)
    buffers = BufferState(module)
    freezing = build_freezing(loaded, module)
    freezing.unfreeze_all()  # for the optimizer, which holds all that is ever trained, and for what memory must hold
    data = components.build_training_data(loaded)
    told = data.identity((strategy.world_size, loaded.values.data.loader.num_workers))
    seen = {"a run folder shared with rank 0": _sees_run_folder(loaded.output)} if strategy.world_size > 1 else {}
    compare_ranks(loaded, strategy, module, told, {"the weights of model.weights": weights, **seen})
    if data.steps_per_epoch == 0:
        sampler = loaded.values.data.sampler or loaded.values.data.batch_sampler
        if sampler is not None and not loaded.values.data.drop_last:
            raise DataError(f"data.train: {sampler.target} draws no samples")
        raise DataError("data.train: drop_last leaves no global batch; it has fewer samples than batch.global_size")
    length = schedule_length(loaded, data)
    contents = _contents(loaded, strategy, data, stored)
    identity = _identity(loaded, strategy, _Fresh(module, data, contents, length, weights), stored, warn)
    sharing = Sharing(identity.slots, strategy.world_size, strategy.rank)
    components.check_batch_norm(loaded, sharing, smallest_batch=data.smallest_batch)
    optimizer = build_optimizer(loaded, module)
    groups = group_names(loaded, module, optimizer)
    begin_training(optimizer)
    freezing.apply(0)
    schedule = build_schedule(loaded, optimizer, length)
    built = Built.of(loaded, module, optimizer)
    progress = Progress()
    if stored is not None:
        progress.load_state_dict(stored["progress"])
    freezing.apply(progress.cursor.epoch)
    memory = state_bytes(loaded, module, optimizer, strategy.world_size)
    parameters = _trained_and_frozen(module)  # of which a strategy may leave this rank a part
    strategy.prepare(module, optimizer)
    averaging = build_averaging(loaded, strategy)
    divergence = Divergence(
        loaded.values.divergence,
        sum_over_ranks=lambda value: float(sum_over_ranks(torch.tensor(value, dtype=torch.float64), strategy.device)),
        tell=warn,
    )
    stopping = loaded.values.limit.early_stopping
    early_stopping = EarlyStopping(stopping) if stopping is not None else None
    state = RunState(
        module, optimizer, schedule, averaging, strategy, divergence, early_stopping, progress, built, buffers
    )
    return Prepared(data, contents, identity, sharing, state, freezing, groups, parameters, memory)


def tell_of_component(loaded: LoadedConfiguration, error: Exception, state: RunState) -> None:
    """Raise an error of the schedule, or of the optimizer's first update, as one of its section; leave any other alone.

    Raises:
        ConfigurationError: it was one of these.
    """
    schedule, progress = loaded.values.schedule, state.progress
    if schedule is not None and raised_within(error, state.schedule):
        what, key = schedule.target, "schedule"
    elif progress.updates == 0 and raised_within(error, state.optimizer):
        what, key = type(state.optimizer).__name__, "optimizer"
    else:
        return
    told = f"{what} raised {described(error)} at step {progress.step + 1}"
    raise ConfigurationError([loaded.problem((key,), told)]) from error


def _trained_and_frozen(module: TrainingModule) -> tuple[int, int]:
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return trained, sum(p.numel() for p in module.parameters()) - trained


def build_averaging(loaded: LoadedConfiguration, strategy: Strategy) -> WeightAverage | None:
    """Build the running average of a prepared module's weights, or None if the configuration wants none."""
    section = loaded.values.averaging
    return WeightAverage(strategy.unwrapped, section, strategy.weights()) if section is not None else None


def build_evaluator(
    loaded: LoadedConfiguration,
    strategy: Strategy,
    name: Literal["validation", "test"],
    *,
    slots: int,
    closing: ExitStack | None = None,
) -> Evaluator | None:
    """Build the evaluator of one split, or None if there is no such data.

    Args:
        closing: where it is evaluated again and again: loader workers then live until this is closed.
    """
    samples = components.build_samples(loaded, name, batch_size=evaluation_micro_size(loaded, slots))
    return evaluator_of(samples, loaded, strategy, name, slots=slots, closing=closing) if samples is not None else None


def evaluation_micro_size(loaded: LoadedConfiguration, slots: int) -> int:
    """Return how many samples one forward pass takes in evaluation and prediction."""
    return loaded.values.evaluation.micro_size or -(-loaded.values.batch.global_size // slots)


def evaluator_of(
    samples: Samples | StreamSamples,
    loaded: LoadedConfiguration,
    strategy: Strategy,
    name: str,
    *,
    slots: int,
    closing: ExitStack | None = None,
) -> Evaluator:
    """Build the evaluator of samples that have been built; see :func:`build_evaluator`."""
    values = loaded.values
    return Evaluator(
        name,
        samples,
        micro_size=evaluation_micro_size(loaded, slots),
        strategy=strategy,
        metrics=MetricSet(components.build_metrics(loaded), strategy.device),
        make_loader=components.build_loader(loaded, strategy.device, closing),
        seed=values.seed,
    )


def build_averaged_evaluation(
    loaded: LoadedConfiguration,
    prepared: Prepared,
    strategy: Strategy,
    *,
    closing: ExitStack,
    enter: Callable[[], None],
    tell: Callable[[str], None],
) -> AveragedEvaluation:
    """Build what decides which weights are evaluated.

    Args:
        closing: loader workers of such passes live until it is closed.
        enter: told each global batch of a pass for BatchNorm statistics.
        tell: told where the averaged weights begin to be evaluated.

    Raises:
        ConfigurationError: the average would need BatchNorm statistics that cannot be computed.
    """
    section, average, data, statistics = loaded.values.averaging, prepared.state.averaging, prepared.data, None
    if isinstance(data, MappedData):
        statistics = BatchStatistics(
            data.samples,
            data.order,
            sharing=prepared.sharing,
            strategy=strategy,
            make_loader=components.build_loader(loaded, strategy.device, closing),
            seed=loaded.values.seed,
            enter=enter,
        )
    elif average is not None and average.has_statistics:
        what = "swa cannot compute BatchNorm statistics over a stream; use ema, or a model without BatchNorm"
        raise ConfigurationError([loaded.problem(("averaging", "kind"), what)])
    wanted = section is not None and section.evaluate
    may_end = loaded.values.limit.early_stopping is not None
    return AveragedEvaluation(average, wanted=wanted, may_end=may_end, statistics=statistics, tell=tell)


@dataclass(frozen=True)
class _Fresh:
    """What K is found with at a first start, and what identifies the data and the weights."""

    module: TrainingModule
    data: TrainingData
    contents: Contents
    schedule_length: int | None
    weights: str | None


def build_module(
    loaded: LoadedConfiguration,
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
    model, objective = components.build_model(loaded), build_objective(loaded)
    if training:
        components.refuse_sparse(loaded, model)
    report = components.load_pretrained(loaded, model) if tell is not None else None
    if tell is not None and report is not None:
        tell(str(report))
    if loaded.values.batch_norm == "sync" and training:
        if strategy.device.type != "cuda":
            raise ConfigurationError([loaded.problem(("batch_norm",), "sync needs GPUs; use local")])
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    if loaded.values.compile is not None and torch.are_deterministic_algorithms_enabled():
        from torch._inductor import config as inductor

        inductor.fallback_random = True  # compiled code then draws eager's random numbers
    components.rebuild_blocks(loaded, model)
    return strategy.place(TrainingModule(model, objective))


def compare_ranks(
    loaded: LoadedConfiguration,
    strategy: Strategy,
    module: TrainingModule,
    data: Mapping[str, Any],
    more: Mapping[str, Any] | None = None,
) -> None:
    """Refuse ranks that were started differently. Collective: every rank must call this.

    Args:
        data: what identifies the data.
        more: what else must be equal.

    Raises:
        RanksDifferError: naming the rank and the difference.
    """
    # Free keys as well: evaluating or reporting at another interval, a rank would enter a collective alone.
    facts = {
        **{f"configuration {k}": v for k, v in flatten(loaded.resolved()).items() if not k.startswith(_OF_ONE_RANK)},
        **versions(),
        "code": code_digest(loaded.code),
        "data": dict(data),
        "parameter shapes": shapes(module),
        **(more or {}),
    }
    # A rank may have imported modules that others have not (yet): rank 0 alone draws pictures, say.
    files = loaded_code(loaded.code, loaded.resolved())["files"]
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
    loaded: LoadedConfiguration,
    strategy: Strategy,
    fresh: _Fresh,
    stored: Mapping[str, Any] | None,
    warn: Callable[[str], None],
) -> Identity:
    batch, world_size = loaded.values.batch, strategy.world_size
    if batch.global_size < world_size:
        what = f"{batch.global_size} {loaded.values.data.unit} cannot keep {world_size} processes busy; use fewer processes"
        raise ConfigurationError([loaded.problem(("batch", "global_size"), what)])
    data = fresh.data.identity((world_size, loaded.values.data.loader.num_workers))
    length = fresh.schedule_length if follows_limit(loaded) else None
    weights = fresh.weights
    if stored is None:
        slots = batch.slots or default_slots(batch.global_size, _micro_size(loaded, strategy, fresh), world_size)
        known = fresh.contents.known
        return Identity(loaded.resolved(), slots, data, length, secrets.token_hex(4), weights, known)
    identity = Identity(**stored["identity"])
    differing = changed(identity.contents, fresh.contents.known)
    check_identity(identity, loaded, data=data, contents=differing, schedule_length=length, weights=weights)
    slots = slots_on_resumption(identity.slots, loaded)
    if weights is not None and weights != identity.weights:
        warn("model.weights: the file's other content changes nothing: a run that goes on has its checkpoint's weights")
    threads, before = torch.get_num_threads(), stored["made_by"].get("threads")
    if strategy.device.type == "cpu" and threads != before:
        warn(
            f"{threads} threads a process, {before} before: equal to rounding from here on, not bit for bit (OMP_NUM_THREADS)"
        )
    if slots != identity.slots:
        warn(
            f"K changes from {identity.slots} to {slots}: from here on only models without randomness or batch statistics "
            "in the forward pass keep the answer"
        )
    known = {**identity.contents, **fresh.contents.known}
    return Identity(loaded.resolved(), slots, data, length, identity.tracker_id, weights or identity.weights, known)


def _contents(
    loaded: LoadedConfiguration, strategy: Strategy, data: TrainingData, stored: Mapping[str, Any] | None
) -> Contents:
    """Look at all data that the run reads. Collective."""
    evaluated = {name: components.build_samples(loaded, name, batch_size=1) for name in ("validation", "test")}
    order = data.order if isinstance(data, MappedData) else None
    before = stored["identity"].get("contents", {}) if stored is not None else None
    return contents_of(loaded, strategy, {"train": data.samples, **evaluated}, order=order, stored=before)


def _micro_size(loaded: LoadedConfiguration, strategy: Strategy, fresh: _Fresh) -> int:
    batch = loaded.values.batch
    if batch.micro_size != "auto":
        return batch.largest_slot
    largest = -(-batch.global_size // strategy.world_size)
    return fitting_micro_size(fresh.module, fresh.data.first_batch, largest=largest, strategy=strategy)
