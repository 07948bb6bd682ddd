"""Collective access to the run folder: lock, newest valid checkpoint, saves and rollbacks. Rank 0 reads and writes.

Methods return the same value on every rank; an error on rank 0 is raised on all.
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
    """A checkpoint to resume from.

    Args:
        path: its folder.
        results: of the evaluation after its step.
        judged: whether they may decide which checkpoints are the best.
        rollbacks: those recorded after its state was saved.
    """

    path: Path
    results: Mapping[str, Any]
    judged: bool
    rollbacks: tuple[Rollback, ...]


class RunFolder:
    """The files of one run.

    Args:
        path: the folder.
        rank: of this process.
        device: the process group's.
        section: what is saved and kept.
        warn: called with a message about damaged checkpoints.
        writers: number of ranks that save: all if the state is sharded, else 1 (rank 0).
        timeout_seconds: longest wait of a writer for the others.
        job: id of the scheduler's job of this start, if any, and its restart count: a job's later start takes over the lock
            from an earlier one.
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
        self._resumed_from: Path | None = None
        self._num_writers = writers
        self._timeout_seconds = timeout_seconds

    def open(self) -> None:
        """Create the folder and acquire its lock. Collective: every rank must call this.

        Raises:
            RunFolderError: it cannot be created, or another job is writing to it.
        """
        self._on_rank_0(self._open)
        if self._checkpoints is not None or self._num_writers > 1:
            writers = WriterGroup(rank=self._rank, world_size=self._num_writers, timeout_seconds=self._timeout_seconds)
            self._saving = AsyncSaver(self._checkpoints, writers)

    def close(self) -> None:
        """Wait for the current save and release the lock. Never raises."""
        if self._saving is not None:
            self._saving.wait()
        if self._run_lock is not None:
            self._run_lock.release()

    def newest(self, resume: ResumeSection) -> ResumePoint | None:
        """Return the newest whole checkpoint. Collective: every rank must call this.

        Raises:
            RunFolderError: ``resume.mode`` is ``never`` and there is a checkpoint, or ``must`` and there is none.
            CheckpointError: a checkpoint has a newer format.
        """
        point = self._resume_point(self._on_rank_0(self._newest))
        if point and resume.mode == "never":
            raise RunFolderError(f"{self.path} holds a checkpoint and resume.mode is never; choose another output")
        if not point and resume.mode == "must":
            raise RunFolderError(f"{self.path} holds no checkpoint and resume.mode is must")
        return point

    def prepare_saving(self, collect: Callable[[], Mapping[str, Any]]) -> None:
        """Start allocating host buffers, once the optimizer state exists; later calls do nothing."""
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
        """Copy the state and write it in the background. Collective: every rank must call this.

        Args:
            judged: whether the results may decide which checkpoints are the best.

        Raises:
            CheckpointError: the copy, or the previous save, failed.
        """

        def save() -> None:
            assert self._saving is not None
            self._saving.save(collect(), results=results, judged=judged, **of_snapshot)
            self._raise_problem()

        if self._num_writers > 1:
            self._wait_for_all()
            save()
        else:
            self._on_rank_0(save)
        if judged:
            self._best.add(results)

    def is_best(self, results: Mapping[str, Any]) -> bool:
        """Whether results are among the best of ``checkpoint.best``, so that their step must be saved."""
        return self._best.improved_by(results)

    @property
    def saving_prepared(self) -> bool:
        """Whether :meth:`prepare_saving` was called."""
        return self._prepared

    @property
    def owned(self) -> bool:
        """Whether the folder was opened and no other job has taken it over; on rank 0 only."""
        if self._run_lock is None:
            return False
        try:
            self._run_lock.check()
        except RunFolderError:
            return False
        return True

    @property
    def failing(self) -> bool:
        """Whether a save has failed; on rank 0 only, until the next collective save."""
        return self._saving is not None and self._saving.problem is not None

    @property
    def save_seconds(self) -> float:
        """Longest save so far; 0 on ranks other than 0."""
        return self._saving.longest_seconds if self._saving is not None else 0.0

    def take_written(self) -> Checkpoint | None:
        """Wait for the current save, and return the last checkpoint written unless it was returned before; on rank 0 only."""
        if self._checkpoints is None or self._saving is None:
            return None
        self._saving.wait()
        written, self._saving.unreported = self._saving.unreported, None
        return self._checkpoints.at(written) if written is not None else None

    def finish_saving(self) -> None:
        """Wait until everything is on disk. Collective: every rank must call this.

        Raises:
            CheckpointError: the last save failed.
        """
        self._wait_for_all()

    def _wait_for_all(self) -> None:
        """Wait until all ranks have finished writing, and raise rank 0's error on all. Collective."""
        if self._saving is not None:
            self._saving.wait()
        self._on_rank_0(self._raise_problem)

    def roll_back(self, wanted: RollbackWanted, *, max_rollbacks: int, learning_rate_factor: float) -> ResumePoint:
        """Return the last good checkpoint and abandon later ones. Collective: every rank must call this.

        A checkpoint is good if its model holds no NaN or infinity, and the last rollback did not return to it already.

        Raises:
            DivergenceError: there have been too many rollbacks, or there is no checkpoint with finite weights.
        """
        self._wait_for_all()
        point = self._resume_point(
            self._on_rank_0(lambda: self._roll_back(wanted, max_rollbacks, learning_rate_factor))
        )
        assert point is not None
        return point

    def last_saved(self) -> Path | None:
        """Return the newest checkpoint of this start, else the one that it resumed from. Collective."""

        def last_path() -> str | None:
            saved = self._saving.saved if self._saving is not None else None
            return str(saved or self._resumed_from or "") or None

        path = self._on_rank_0(last_path)
        return Path(path) if path is not None else None

    def best_messages(self) -> list[str]:
        """Return one line for each metric's best checkpoint, on rank 0."""
        if self._checkpoints is None:
            return []
        leading = ((best.metric, c) for best in self._section.best for c in self._checkpoints.best(best)[:1])
        return [f"best {metric} {c.results[metric]:.4f}: {c.path}" for metric, c in leading]

    def _open(self) -> None:
        files = RunFiles(self.path)
        try:
            make_folder(self.path)
        except OSError as error:
            raise RunFolderError(f"cannot create the run folder {self.path}: {error.strerror}") from error
        job, restart = self._job
        self._run_lock = RunLock(
            self.path, job=job, restart=restart, wait=_LOGGER.info
        )  # logged at once: it may take long
        self._run_lock.acquire()
        files.stop.unlink(missing_ok=True)  # left over from an earlier start
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

        def unusable(checkpoint: Checkpoint) -> str | None:
            last = rollback_history.rollbacks[-1] if rollback_history.rollbacks else None
            if last is not None and last.target_step == checkpoint.step and checkpoint.attempt < last.attempt:
                return "the run diverged again after the last rollback to it"
            return _non_finite(checkpoint)

        target = self._checkpoints.newest(usable=unusable) or self._checkpoints.newest(usable=_non_finite)
        if target is None:
            raise DivergenceError(f"{where}; there is no checkpoint with finite weights to return to")
        attempt = max([rollback.attempt for rollback in rollback_history.rollbacks], default=0) + 1
        assert self._run_lock is not None
        self._run_lock.check()
        rollback_history.record(Rollback(attempt, target.step, wanted.step, wanted.reason, (wanted.cursor,), factor))
        return self._as_plain(target)

    def _as_plain(self, checkpoint: Checkpoint | None) -> dict[str, Any]:
        """Return the resume point and the results of all checkpoints as plain data, to send to the other ranks."""
        assert self._checkpoints is not None
        saved = [dict(results) for results in self._checkpoints.results()]
        if checkpoint is None:
            return {"saved": saved}
        rollbacks = [asdict(rollback) for rollback in self._checkpoints.rollback_history.since(checkpoint.attempt)]
        point = {"path": str(checkpoint.path), "results": dict(checkpoint.results), "judged": checkpoint.judged}
        return {"saved": saved, "point": point | {"rollbacks": rollbacks}}

    def _resume_point(self, reply: Mapping[str, Any]) -> ResumePoint | None:
        self._best = BestResults(self._section.best, reply["saved"])
        if "point" not in reply:
            return None
        point = reply["point"]
        self._resumed_from = Path(point["path"])
        rollbacks = tuple(Rollback.read(entry) for entry in point["rollbacks"])
        return ResumePoint(Path(point["path"]), point["results"], point["judged"], rollbacks)

    def _raise_problem(self) -> None:
        if self._saving is not None and self._saving.problem is not None:
            raise CheckpointError(self._saving.problem)

    def _on_rank_0(self, act: Callable[[], Any]) -> Any:
        """Return rank 0's result on all ranks, or raise its error on all. Collective."""

        def run() -> Any:
            try:
                return act()
            except OSError as error:
                raise RunFolderError(f"{self.path}: {error.strerror or error}") from error

        return on_rank_0(run, rank=self._rank, device=self._device)


def _non_finite(checkpoint: Checkpoint) -> str | None:
    """Return which of the model's tensors holds a NaN or an infinity, or None."""
    for name, stored in tensors_on_disk(checkpoint.path, "model").items():
        if stored.dtype.is_complex or stored.dtype.is_floating_point:
            values = whole(stored)
            if torch.isfinite(values.float() if values.element_size() == 1 else values).all():
                continue
            return f"{name} in it is not finite"
    return None
