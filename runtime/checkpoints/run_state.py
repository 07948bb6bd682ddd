"""The state of a run, and whether a checkpoint may be resumed under the current configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from runtime.checkpoints.built_state import SCHEDULER_KEYS, BuiltState
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
    """The components whose state a checkpoint holds; their state is equal on every rank.

    Args:
        built: how they were built, before any state was loaded.
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

        Where the optimizer has an eval mode (schedule-free), ``model`` holds the evaluation weights and
        ``training["weights"]`` the training weights.
        Collective if the ranks hold parts of the state.
        """
        state_io = self.strategy.state_io
        weights = training_weights(self.optimizer, self.module, state_io.weights())
        with evaluated_weights(self.optimizer):
            model = state_io.module_state(self.module.model)
            objective = state_io.module_state(self.module.objective)
            if weights is not None:  # switching back to the training weights would change them
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
        """Load a state. Collective.

        The strategy has prepared module and optimizer; tensors may be read lazily from disk. The schedule is loaded after the
        optimizer, since it stores the learning rates without the warm-up factor.

        Raises:
            CheckpointError: the state does not fit the model or the optimizer.
        """
        expected, stored = _group_keys(self.optimizer.param_groups), _group_keys(training["optimizer"]["param_groups"])
        state_io, before = self.strategy.state_io, training.get("built", asdict(self.built))
        if expected - SCHEDULER_KEYS != stored - SCHEDULER_KEYS:
            raise CheckpointError(
                f"the checkpoint does not fit {type(self.optimizer).__name__}: it was saved with another optimizer, whose "
                f"parameter groups have the keys {sorted(stored)}"
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

    def apply_rollbacks(self, rollbacks: Iterable[Rollback]) -> None:
        """Apply rollbacks that were recorded after this state was saved: attempt, skipped batches, learning rate."""
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
        load: loads a state dict into the model or the objective.

    Raises:
        RuntimeError, ValueError, KeyError: they do not fit.
    """
    for part, prefix, state in ((module.model, "model.", model), (module.objective, "objective.", objective)):
        make_room(part, prefix, state, buffers["made"])
        load(part, state)
    load_buffers(module, buffers["changed"])


@dataclass(frozen=True)
class RunFingerprint:
    """Identity of a run: must be unchanged on resumption, unless a change is allowed.

    Args:
        configuration: resolved values.
        slots: K.
        data: the training data's fingerprint.
        schedule_length: the run length passed to the schedule, if derived from the limit.
        tracker_id: W&B's run id.
        weights: digest of the file from which the model's weights were loaded at the first start.
        contents: digests of a few samples of each part of the data, and of the inputs that determine the order.
    """

    configuration: Mapping[str, Any]
    slots: int
    data: Mapping[str, Any]
    schedule_length: int | None
    tracker_id: str
    weights: str | None = None
    contents: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


def check_training_state(training: Mapping[str, Any], name: str) -> None:
    """Validate the structure of a training state, before anything is built from it.

    Raises:
        CheckpointError: it was not written by this version; names the checkpoint.
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
        valid = all(type(number) is int and number >= 0 for number in counters) and fingerprint.slots > 0
        valid &= all(isinstance(mapping, Mapping) for mapping in maps)
    except (ValueError, LookupError, TypeError, AttributeError):
        valid = False
    if not valid:
        raise CheckpointError(
            f"{name} holds a training state that this version of Lockstep does not write: choose another folder (output=…), "
            "or remove this checkpoint to resume from the previous one"
        )


def check_identity(
    stored: RunFingerprint,
    now: RunFingerprint,
    *,
    contents: Mapping[str, str],
    allowed: Sequence[str],
    folder: Path,
) -> None:
    """Compare the run that a checkpoint belongs to with the current one.

    Args:
        contents: by part of the data, what differs.
        allowed: keys that may change.
        folder: the run folder.

    Raises:
        RunFolderError: an exact key changed, with its old and new value; or the data did.
    """
    old, new = exact_keys(stored.configuration), exact_keys(now.configuration)
    for keys in (old, new):
        keys.pop("batch.slots")  # by default fixed at the first start: checked by slots_on_resumption
    changes = [
        f"{key}: was {old.get(key, 'not set')!r}, is {new.get(key, 'not set')!r}"
        for key in sorted(set(old) | set(new))
        if not _same(old.get(key), new.get(key)) and not _allowed(key, allowed)
    ]
    if stored.schedule_length != now.schedule_length and not _allowed("limit", allowed):
        changes.append(
            f"limit: the schedule's length is derived from it: was {stored.schedule_length}, is {now.schedule_length} "
            "(set the length in schedule.args to be free to change the limit)"
        )
    configured = now.configuration["model"]["weights"] is not None
    removed = now.weights is None and configured  # the file is no longer needed
    if stored.weights != now.weights and not removed and not _allowed("model.weights", allowed):
        changes.append(f"model.weights: the file's digest was {stored.weights}, is {now.weights}")
    if dict(stored.data) != dict(now.data) and not _allowed("data", allowed):
        changes.append(f"data.train: was {dict(stored.data)}, is {dict(now.data)}")
    changes += [
        f"data.{part}: {what} changed since the first start: the data, or the code that reads it, is different"
        for part, what in contents.items()
        if not _allowed(f"data.{part}", allowed)
    ]
    if changes:
        listed = "\n  ".join(changes)
        raise RunFolderError(
            f"{folder} holds a run with another configuration:\n  {listed}\n"
            "Choose another folder (output=…), or allow the change with resume.allow_changes=[KEY, …]"
        )


def determinism_on_resumption(training: Mapping[str, Any], now: str | None) -> str | None:
    """Return a warning if only some of a run's steps are made with ``determinism: exact``; None otherwise.

    Args:
        now: this start's ``determinism``.
    """
    step, before = training["progress"]["step"], training["identity"]["configuration"].get("determinism")
    if not step or (before == "exact") == (now == "exact"):
        return None
    made = "the first step was" if step == 1 else f"the first {step:,} steps were"
    if now == "exact":
        return f"{made} not made with determinism: exact, so this run's bits depend on the number of processes that made them"
    return f"{made} made with determinism: exact, the next are not: from here on the bits depend on the number of processes"


def cursor_on_resumption(
    training: Mapping[str, Any], batch_size: int, data: DataSection, *, allowed: Sequence[str], folder: Path
) -> list[int]:
    """Return the cursor (epoch, batch) of a resumed run, converted if ``batch.global_size`` was allowed to change.

    Args:
        batch_size: the current global batch size.
        allowed: keys that may change.
        folder: the run folder.

    Raises:
        RunFolderError: the samples of the epoch trained so far are not a multiple of the new batch size.
    """
    epoch, batch = training["progress"]["cursor"]
    before, now = training["identity"]["configuration"]["batch"]["global_size"], batch_size
    if before == now or not batch or not _allowed("batch.global_size", allowed):
        return [epoch, batch]
    custom_batches = (data.batch_sampler, data.group_by_length, data.budget, data.balance)
    by_samples = training["identity"]["data"].get("samples") is not None and not any(custom_batches)
    skips_ahead = any(list(cursor) >= [epoch, batch] for cursor in training["progress"]["skipped_batches"])
    if by_samples and not skips_ahead and batch * before % now == 0:
        return [epoch, batch * before // now]
    raise RunFolderError(
        f"{folder} holds a run in the middle of epoch {epoch + 1}, after {batch} batches of {before}: with "
        f"batch.global_size {now} some of its samples would be repeated or left out. Change it at the end of an epoch"
        + (f", or to a divisor of {batch * before}" if by_samples and not skips_ahead else "")
    )


def slots_on_resumption(stored: int, batch: BatchSection, *, allowed: Sequence[str], folder: Path) -> int:
    """Return K for a resumed run: the stored one, unless a change is allowed.

    Args:
        allowed: keys that may change.
        folder: the run folder.

    Raises:
        RunFolderError: K would have to change.
    """
    slots = batch.slots
    micro_size = batch.largest_slot  # 'auto' keeps the size found at the first start
    if slots is None:
        slots = stored if -(-batch.global_size // stored) <= micro_size else -(-batch.global_size // micro_size)
    if slots != stored and not _allowed("batch.slots", allowed):
        raise RunFolderError(
            f"{folder} holds a run with {stored} slots, and {slots} are needed now (batch.slots, batch.micro_size). "
            "Results stay the same only for models without randomness or batch statistics in the forward pass: "
            f"allow the change with resume.allow_changes=[batch.slots]"
        )
    return slots


def _same(old: Any, new: Any) -> bool:
    return bool(old == new) or repr(old) == repr(new)  # NaN != NaN


def _group_keys(groups: Iterable[Mapping[str, Any]]) -> set[str]:
    return {key for group in groups for key in group}


def _allowed(key: str, allowed: Sequence[str]) -> bool:
    return any(key == a or key.startswith(a + ".") for a in allowed)
