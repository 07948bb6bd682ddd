"""What a run's state consists of, and whether a checkpoint may be continued under the present configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from runtime.checkpoints.built_state import OF_SCHEDULES, BuiltState
from runtime.checkpoints.rollback_history import Rollback
from runtime.config.data import BatchSection, DataSection
from runtime.config.file import exact_keys
from runtime.errors import CheckpointError, RunFolderError
from runtime.objective import TrainingModule
from runtime.optimization.averaging import WeightAverage
from runtime.optimization.optimizer_eval_mode import cloned, evaluated_weights, load_training_weights, training_weights
from runtime.optimization.schedule import Schedule
from runtime.state.module_buffers import BufferState, load_buffers, make_room
from runtime.state.shards import in_memory
from runtime.strategies import Strategy
from runtime.training.divergence import Divergence
from runtime.training.early_stopping import EarlyStopping
from runtime.training.progress import Progress


@dataclass(frozen=True)
class RunState:
    """The parts whose state is the run's: all that a checkpoint holds, and nothing that differs between ranks.

    Args:
        built: what they were before any state was loaded.
    """

    module: TrainingModule
    optimizer: Optimizer
    schedule: Schedule
    averaging: WeightAverage | None
    strategy: Strategy
    divergence: Divergence
    early_stopping: EarlyStopping | None
    progress: Progress
    built: BuiltState
    buffers: BufferState

    def collect(self) -> dict[str, dict[str, Any]]:
        """Return the model's state dict and everything else (``training``), as tensors, shards and plain data.

        Where the optimizer has other weights for evaluation, those are the model's, and training's are beside them.
        Collective where ranks hold parts of the state.
        """
        state_io = self.strategy.state_io
        weights = training_weights(self.optimizer, self.module, state_io.weights())
        with evaluated_weights(self.optimizer):
            model = state_io.module_state(self.module.model)
            objective = state_io.module_state(self.module.objective)
            if weights is not None:  # what is put back below would change them
                model, objective = cloned(model), cloned(objective)
        training = {
            "objective": objective,
            "buffers": self.buffers.state(),
            "weights": weights,
            "optimizer": state_io.optimizer_state(),
            "schedule": self.schedule.state_dict(),
            "averaging": None if self.averaging is None else self.averaging.state_dict(),
            "strategy": dict(state_io.scaler_state()),
            "divergence": self.divergence.state_dict(),
            "early_stopping": None if self.early_stopping is None else self.early_stopping.state_dict(),
            "progress": self.progress.state_dict(),
            "built": asdict(self.built),
        }
        return {"model": model, "training": training}

    def restore(self, model: Mapping[str, Any], training: Mapping[str, Any]) -> None:
        """Go on from a state. The schedule comes after the optimizer, whose rates it knows without its warm-up factor.

        The strategy has prepared module and optimizer; their tensors may be read as they are asked for. Collective.

        Raises:
            CheckpointError: the state does not fit the model or the optimizer.
        """
        wanted, there = _group_keys(self.optimizer.param_groups), _group_keys(training["optimizer"]["param_groups"])
        state_io, before = self.strategy.state_io, training.get("built", asdict(self.built))
        if wanted - OF_SCHEDULES != there - OF_SCHEDULES:
            raise CheckpointError(
                f"the checkpoint does not fit {type(self.optimizer).__name__}: it was made with another optimizer, whose "
                f"groups have {sorted(there)}"
            )
        optimizer_state = self.built.adapted(training["optimizer"], self.optimizer, before)
        changed = self.built.changed_buffers(self.module, before)
        try:
            load_module(state_io.load_module_state, self.module, model, training["objective"], training["buffers"])
            self.buffers.moving[:] = training["buffers"]["moving"]
            state_io.load_optimizer_state(optimizer_state)
            with torch.no_grad():
                for name, buffer in changed.items():
                    self.module.get_buffer(name).copy_(buffer)
            load_training_weights(training.get("weights"), state_io.weights())
            self.schedule.load_state_dict(in_memory(training["schedule"]))
            if self.averaging is not None and training["averaging"] is not None:
                self.averaging.load_state_dict(training["averaging"])
                self.averaging.restore_statistics()
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise CheckpointError(f"the checkpoint does not fit the model or the optimizer: {error}") from error
        state_io.load_scaler_state(training["strategy"])
        self.divergence.load_state_dict(training["divergence"])
        if self.early_stopping is not None:
            self.early_stopping.load_state_dict(training["early_stopping"])
        self.progress.load_state_dict(training["progress"])

    def follow(self, rollbacks: Iterable[Rollback]) -> None:
        """Take the way that rollbacks chose after this state was saved."""
        for rollback in rollbacks:
            self.progress.attempt = rollback.attempt
            self.progress.skipped_batches += rollback.skipped
            self.schedule.lower(rollback.learning_rate_factor)


def load_module(
    load: Callable[[nn.Module, Mapping[str, Any]], None],
    module: TrainingModule,
    model: Mapping[str, Any],
    objective: Mapping[str, Any],
    buffers: Mapping[str, Any],
) -> None:
    """Load state dicts into a placed module, and the buffers that they leave out. Collective where ``load`` is.

    Args:
        load: loads a state dict into a part.

    Raises:
        RuntimeError, ValueError, KeyError: they do not fit.
    """
    for part, prefix, state in ((module.model, "model.", model), (module.objective, "objective.", objective)):
        make_room(part, prefix, state, buffers["made"])
        load(part, state)
    load_buffers(module, buffers["changed"])


@dataclass(frozen=True)
class RunFingerprint:
    """What must be the same, or knowingly changed, when a run is resumed.

    Args:
        configuration: resolved values.
        slots: K.
        data: the training data's fingerprint.
        schedule_length: what the schedule was told the run's length is, if that followed from the limit.
        tracker_id: W&B's run id.
        weights: digest of the file that the model's weights were loaded from at the first start.
        contents: digests of a few samples of each part of the data, and of what orders follow from.
    """

    configuration: Mapping[str, Any]
    slots: int
    data: Mapping[str, Any]
    schedule_length: int | None
    tracker_id: str
    weights: str | None = None
    contents: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


def refuse_misfit(training: Mapping[str, Any], name: str) -> None:
    """Refuse a training state that no run of ours has written, before anything is built from it.

    Raises:
        CheckpointError: naming the checkpoint.
    """
    try:
        fingerprint, progress = RunFingerprint(**training["identity"]), Progress()
        progress.load_state_dict(training["progress"])
        counters = (
            progress.step,
            progress.updates,
            progress.samples,
            progress.attempt,
            *progress.cursor,
            fingerprint.slots,
        )
        maps = (
            fingerprint.configuration,
            fingerprint.data,
            training["made_by"],
            training["optimizer"],
            training["buffers"],
        )
        _group_keys(training["optimizer"]["param_groups"])
        sound = all(type(number) is int and number >= 0 for number in counters) and fingerprint.slots > 0
        sound &= all(isinstance(mapping, Mapping) for mapping in maps)
    except (ValueError, LookupError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise CheckpointError(
            f"{name} holds a training state that no run of this version writes: choose another folder (output=…), or remove "
            "this checkpoint to go on from the one before"
        )


def check_identity(
    stored: RunFingerprint,
    now: RunFingerprint,
    *,
    contents: Mapping[str, str],
    allowed: Sequence[str],
    folder: Path,
) -> None:
    """Compare what a checkpoint was made with and what is asked for now.

    Args:
        contents: by part of the data, what is another than it was.
        allowed: keys that may change.
        folder: of the run.

    Raises:
        RunFolderError: an exact key changed, with its old and new value; or the data did.
    """
    old, new = exact_keys(stored.configuration), exact_keys(now.configuration)
    for keys in (old, new):
        keys.pop("batch.slots")  # by default it follows from the first start: judged by slots_on_resumption
    changes = [
        f"{key}: was {old.get(key, 'not set')!r}, is {new.get(key, 'not set')!r}"
        for key in sorted(set(old) | set(new))
        if not _same(old.get(key), new.get(key)) and not _allowed(key, allowed)
    ]
    if stored.schedule_length != now.schedule_length and not _allowed("limit", allowed):
        changes.append(
            f"limit: the schedule's length followed from it: was {stored.schedule_length}, is {now.schedule_length} "
            "(give schedule.args a length of its own to be free to change the limit)"
        )
    named = now.configuration["model"]["weights"] is not None
    gone = now.weights is None and named  # it is no longer needed
    if stored.weights != now.weights and not gone and not _allowed("model.weights", allowed):
        changes.append(f"model.weights: the file's digest was {stored.weights}, is {now.weights}")
    if dict(stored.data) != dict(now.data) and not _allowed("data", allowed):
        changes.append(f"data.train: was {dict(stored.data)}, is {dict(now.data)}")
    changes += [
        f"data.{part}: {what} is not what it was: the data, or the code that reads it, changed under the run"
        for part, what in contents.items()
        if not _allowed(f"data.{part}", allowed)
    ]
    if changes:
        listed = "\n  ".join(changes)
        raise RunFolderError(
            f"{folder} holds a run of another configuration:\n  {listed}\n"
            "Choose another folder (output=…), or insist with resume.allow_changes=[KEY, …]"
        )


def cursor_on_resumption(
    training: Mapping[str, Any], batch_size: int, data: DataSection, *, allowed: Sequence[str], folder: Path
) -> list[int]:
    """Return the epoch and the batch that a resumed run goes on with, where ``batch.global_size`` was allowed to change.

    Args:
        batch_size: of the global batch, now.
        allowed: keys that may change.
        folder: of the run.

    Raises:
        RunFolderError: the samples of the epoch that were trained are no whole number of such batches.
    """
    epoch, batch = training["progress"]["cursor"]
    before, now = training["identity"]["configuration"]["batch"]["global_size"], batch_size
    if before == now or not batch or not _allowed("batch.global_size", allowed):
        return [epoch, batch]
    own_batches = (data.batch_sampler, data.group_by_length, data.budget, data.balance)
    by_samples = training["identity"]["data"].get("samples") is not None and not any(own_batches)
    left_out = any(list(cursor) >= [epoch, batch] for cursor in training["progress"]["skipped_batches"])
    if by_samples and not left_out and batch * before % now == 0:
        return [epoch, batch * before // now]
    raise RunFolderError(
        f"{folder} holds a run that stands within epoch {epoch + 1}, behind {batch} batches of {before}: with "
        f"batch.global_size {now} some of its samples would come twice or not at all. Change it where an epoch ends"
        + (f", or to a divisor of {batch * before}" if by_samples and not left_out else "")
    )


def slots_on_resumption(stored: int, batch: BatchSection, *, allowed: Sequence[str], folder: Path) -> int:
    """Return K for a resumed run: the stored one, unless a change is allowed.

    Args:
        allowed: keys that may change.
        folder: of the run.

    Raises:
        RunFolderError: K would have to change.
    """
    wanted = batch.slots
    micro_size = batch.largest_slot  # 'auto' keeps what was found at the first start
    if wanted is None:
        wanted = stored if -(-batch.global_size // stored) <= micro_size else -(-batch.global_size // micro_size)
    if wanted != stored and not _allowed("batch.slots", allowed):
        raise RunFolderError(
            f"{folder} holds a run with {stored} slots, and {wanted} are needed now (batch.slots, batch.micro_size). "
            "With another number only models without randomness or batch statistics in the forward pass keep the answer: "
            f"insist with resume.allow_changes=[batch.slots]"
        )
    return wanted


def _same(old: Any, new: Any) -> bool:
    return bool(old == new) or repr(old) == repr(new)  # NaN equals nothing, not even itself


def _group_keys(groups: Iterable[Mapping[str, Any]]) -> set[str]:
    return {key for group in groups for key in group}


def _allowed(key: str, allowed: Sequence[str]) -> bool:
    return any(key == a or key.startswith(a + ".") for a in allowed)
