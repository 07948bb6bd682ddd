"""The run folder as all ranks see it: one owner, the newest good checkpoint, saves and rollbacks. Rank 0 reads and writes.

Every method that returns something tells every rank the same; what goes wrong on rank 0 is raised on all.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from runtime.checkpoints.async_save import AsyncSaver
from runtime.checkpoints.best import BestResults
from runtime.checkpoints.checkpoint import Checkpoint, CheckpointFolder
from runtime.checkpoints.rollback_history import Rollback
from runtime.checkpoints.run_lock import RunLock
from runtime.checkpoints.sharded_files import tensors_on_disk
from runtime.checkpoints.writer_group import WriterGroup
from runtime.config.sections import CheckpointSection, ResumeSection
from runtime.distributed.collectives import on_rank_0
from runtime.errors import CheckpointError, DivergenceError, RunFolderError
from runtime.run_files import RunFiles
from runtime.state.durable_files import make_folder
from runtime.state.shards import whole
from runtime.training.divergence import RollbackWanted

_LOGGER = logging.getLogger("lockstep.checkpoints")


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint to go on from, as rank 0 found it.

    Args:
        path: its folder.
        results: of the evaluation of its step.
        judged: whether they may decide which checkpoints are the best.
        rollbacks: which its state knows nothing of yet.
    """

    path: Path
    results: Mapping[str, Any]
    judged: bool
    rollbacks: tuple[Rollback, ...]


class RunFolder:
    """What is on disk of one run.

    Args:
        path: the folder.
        rank: of this process.
        device: the process group's.
        section: what is saved and kept.
        warn: told what was found damaged.
        writers: how many ranks save: all where each holds a part of the state, otherwise rank 0 alone.
        timeout_seconds: longest wait of a writer for the others.
        job: id of the scheduler's job that this start belongs to, if any, and how often that was started again: a job's later
            start takes over from its earlier one.
    """

    def __init__(
        self,
        path: Path,
        *,
        rank: int,
        device: torch.device,
        section: CheckpointSection,
        warn: Callable[[str], None],
        writers: int = 1,
        timeout_seconds: float = 1800.0,
        job: tuple[str | None, int] = (None, 0),
    ) -> None:
        self.path = path
        self._job = job
        self._rank = rank
        self._device = device
        self._section = section
        self._warn = warn
        self._checkpoints: CheckpointFolder | None = None
        self._saving: AsyncSaver | None = None
        self._run_lock: RunLock | None = None
        self._best = BestResults(section.best, [])
        self._prepared = False
        self._went_on_from: Path | None = None
        self._num_writers = writers
        self._timeout_seconds = timeout_seconds

    def open(self) -> None:
        """Make the folder, and keep other jobs from writing to it. Collective: every rank must call this.

        Raises:
            RunFolderError: it cannot be made, or another job is writing to it.
        """
        self._on_rank_0(self._open)
        if self._checkpoints is not None or self._num_writers > 1:
            writers = WriterGroup(rank=self._rank, world_size=self._num_writers, timeout_seconds=self._timeout_seconds)
            self._saving = AsyncSaver(self._checkpoints, writers)

    def close(self) -> None:
        """Let what is being written be finished, and other jobs in. Never raises."""
        if self._saving is not None:
            self._saving.wait()
        if self._run_lock is not None:
            self._run_lock.release()

    def newest(self, resume: ResumeSection) -> ResumePoint | None:
        """Return the newest whole checkpoint. Collective: every rank must call this.

        Raises:
            RunFolderError: ``resume.mode`` forbids what is there, or what is not.
            CheckpointError: a checkpoint has a newer format.
        """
        found = self._go_on(self._on_rank_0(self._newest))
        if found and resume.mode == "never":
            raise RunFolderError(f"{self.path} holds a checkpoint and resume.mode is never; choose another output")
        if not found and resume.mode == "must":
            raise RunFolderError(f"{self.path} holds no checkpoint and resume.mode is must")
        return found

    def prepare_saving(self, collect: Callable[[], Mapping[str, Any]]) -> None:
        """Make room for copies of the state, once there is an optimizer state to copy; later calls do nothing."""
        if self._saving is not None and not self._prepared:
            self._saving.prepare(collect())
        self._prepared = True

    def save(
        self,
        collect: Callable[[], Mapping[str, Any]],
        *,
        results: Mapping[str, Any],
        judged: bool = True,
        **of_snapshot: Any,
    ) -> None:
        """Copy the state and let it be written. Collective: every rank must call this.

        Args:
            judged: whether the results may decide which checkpoints are the best.

        Raises:
            CheckpointError: the copy, or the save before this one, failed.
        """

        def save() -> None:
            assert self._saving is not None
            self._saving.save(collect(), results=results, judged=judged, **of_snapshot)
            self._refuse_problem()

        if self._num_writers > 1:
            self._wait_for_all()
            save()
        else:
            self._on_rank_0(save)
        if judged:
            self._best.add(results)

    def is_best(self, results: Mapping[str, Any]) -> bool:
        """Tell whether results are among the best of ``checkpoint.best``, and their step has to be saved."""
        return self._best.improved_by(results)

    @property
    def saving_prepared(self) -> bool:
        """Tell whether :meth:`prepare_saving` was called."""
        return self._prepared

    @property
    def owned(self) -> bool:
        """Tell whether the folder was opened and no other job has taken it over; known on rank 0 only."""
        if self._run_lock is None:
            return False
        try:
            self._run_lock.check()
        except RunFolderError:
            return False
        return True

    @property
    def failing(self) -> bool:
        """Tell whether a save has failed; known on rank 0 only, until all ranks meet at the next save."""
        return self._saving is not None and self._saving.problem is not None

    @property
    def save_seconds(self) -> float:
        """The longest that a save has taken; 0 on other ranks than 0."""
        return self._saving.longest_seconds if self._saving is not None else 0.0

    def finish_saving(self) -> None:
        """Wait until everything is on disk. Collective: every rank must call this.

        Raises:
            CheckpointError: the last save failed.
        """
        self._wait_for_all()

    def _wait_for_all(self) -> None:
        """Wait until no rank writes any more, and raise what went wrong on rank 0, on all. Collective."""
        if self._saving is not None:
            self._saving.wait()
        self._on_rank_0(self._refuse_problem)

    def roll_back(self, wanted: RollbackWanted, *, max_rollbacks: int, learning_rate_factor: float) -> ResumePoint:
        """Abandon what came after the last good checkpoint, and return that. Collective: every rank must call this.

        Good is a checkpoint whose model holds no NaN or infinity, and which an earlier rollback has not returned to in vain.

        Raises:
            DivergenceError: there have been too many rollbacks, or there is no good checkpoint.
        """
        self._wait_for_all()
        found = self._go_on(self._on_rank_0(lambda: self._roll_back(wanted, max_rollbacks, learning_rate_factor)))
        assert found is not None
        return found

    def last_saved(self) -> Path | None:
        """Return the newest checkpoint of this start, or that which it went on from. Collective."""

        def told() -> str | None:
            saved = self._saving.saved if self._saving is not None else None
            return str(saved or self._went_on_from or "") or None

        path = self._on_rank_0(told)
        return Path(path) if path is not None else None

    def best_messages(self) -> list[str]:
        """Name the best checkpoints, on rank 0."""
        if self._checkpoints is None:
            return []
        found = ((best.metric, c) for best in self._section.best for c in self._checkpoints.best(best)[:1])
        return [f"best {metric} {c.results[metric]:.4f}: {c.path}" for metric, c in found]

    def _open(self) -> None:
        files = RunFiles(self.path)
        try:
            make_folder(self.path)
        except OSError as error:
            raise RunFolderError(f"the run folder {self.path} cannot be made: {error.strerror}") from error
        job, restart = self._job
        self._run_lock = RunLock(self.path, job=job, restart=restart, wait=_LOGGER.info)  # at once: it may take a while
        self._run_lock.acquire()
        files.stop.unlink(missing_ok=True)  # of an earlier start
        self._checkpoints = CheckpointFolder(
            files.checkpoints,
            keep=self._section.keep,
            best=self._section.best,
            warn=self._warn,
            before_commit=self._run_lock.check,
        )
        self._checkpoints.clear_partial()

    def _newest(self) -> dict[str, Any]:
        assert self._checkpoints is not None
        newest = self._checkpoints.newest()
        self._checkpoints.record_best()
        return self._as_plain(newest)

    def _roll_back(self, wanted: RollbackWanted, max_rollbacks: int, factor: float) -> dict[str, Any]:
        assert self._checkpoints is not None
        rollback_history = self._checkpoints.rollback_history
        where = f"step {wanted.step}: {wanted.reason}"
        if len(rollback_history.rollbacks) >= max_rollbacks:
            raise DivergenceError(
                f"{where}; the run has been rolled back {max_rollbacks} times (divergence.max_rollbacks)"
            )

        def returned_in_vain(checkpoint: Checkpoint) -> str | None:
            last = rollback_history.rollbacks[-1] if rollback_history.rollbacks else None
            if last is not None and last.target_step == checkpoint.step and checkpoint.attempt < last.attempt:
                return "the last rollback returned to it, and the run went astray again"
            return _poison(checkpoint)

        target = self._checkpoints.newest(usable=returned_in_vain) or self._checkpoints.newest(usable=_poison)
        if target is None:
            raise DivergenceError(f"{where}; there is no checkpoint with finite weights to return to")
        attempt = max([rollback.attempt for rollback in rollback_history.rollbacks], default=0) + 1
        assert self._run_lock is not None
        self._run_lock.check()
        rollback_history.record(Rollback(attempt, target.step, wanted.step, wanted.reason, (wanted.cursor,), factor))
        return self._as_plain(target)

    def _as_plain(self, checkpoint: Checkpoint | None) -> dict[str, Any]:
        """Return what to go on from, and the results of all that is there, as plain data that travels between ranks."""
        assert self._checkpoints is not None
        saved = [dict(results) for results in self._checkpoints.results()]
        if checkpoint is None:
            return {"saved": saved}
        rollbacks = [asdict(rollback) for rollback in self._checkpoints.rollback_history.since(checkpoint.attempt)]
        found = {"path": str(checkpoint.path), "results": dict(checkpoint.results), "judged": checkpoint.judged}
        return {"saved": saved, "found": found | {"rollbacks": rollbacks}}

    def _go_on(self, reply: Mapping[str, Any]) -> ResumePoint | None:
        self._best = BestResults(self._section.best, reply["saved"])
        if "found" not in reply:
            return None
        found = reply["found"]
        self._went_on_from = Path(found["path"])
        rollbacks = tuple(Rollback.read(entry) for entry in found["rollbacks"])
        return ResumePoint(Path(found["path"]), found["results"], found["judged"], rollbacks)

    def _refuse_problem(self) -> None:
        if self._saving is not None and self._saving.problem is not None:
            raise CheckpointError(self._saving.problem)

    def _on_rank_0(self, act: Callable[[], Any]) -> Any:
        """Return on all ranks what rank 0 got, or raise on all what it raised. Collective."""

        def told() -> Any:
            try:
                return act()
            except OSError as error:
                raise RunFolderError(f"{self.path}: {error.strerror or error}") from error

        return on_rank_0(told, rank=self._rank, device=self._device)


def _poison(checkpoint: Checkpoint) -> str | None:
    """Say which of the model's tensors holds a NaN or an infinity, or None."""
    for name, stored in tensors_on_disk(checkpoint.path, "model").items():
        if stored.dtype.is_complex or stored.dtype.is_floating_point:
            values = whole(stored)
            if torch.isfinite(values.float() if values.element_size() == 1 else values).all():
                continue
            return f"{name} in it is not finite"
    return None
