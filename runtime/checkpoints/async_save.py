"""Asynchronous saving: the training loop waits for a copy to host memory, a thread writes the files.

A save waits for the previous one, the end of the run for the last. Errors in the thread are kept until the loop reads them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtime.checkpoints.checkpoint import CheckpointFolder, write_own_shard
from runtime.checkpoints.snapshot import HostBuffers, Snapshot
from runtime.checkpoints.writer_group import SINGLE_WRITER, WriterGroup
from runtime.errors import LockstepError


class AsyncSaver:
    """Saves one checkpoint at a time. Used on rank 0, and on every rank if the state is sharded.

    Args:
        checkpoints: of the run; None on ranks other than 0, which write only their shards.
        writers: the ranks that write a checkpoint together.

    Attributes:
        problem: why the last checkpoint could not be written, once known.
        saved: the last checkpoint written, on rank 0.
        unreported: the same until the caller sets it to None.
        longest_seconds: longest save so far, from the copy to the final rename.
    """

    def __init__(self, checkpoints: CheckpointFolder | None, writers: WriterGroup = SINGLE_WRITER) -> None:
        self._checkpoints = checkpoints
        self._writers = writers
        self._buffers = HostBuffers()
        self._thread: threading.Thread | None = None
        self.problem: str | None = None
        self.longest_seconds = 0.0
        self.saved: Path | None = None
        self.unreported: Path | None = None

    def prepare(self, state: Mapping[str, Any]) -> None:
        """Start allocating host buffers for a state like this one."""
        self._buffers.prepare(state)

    def save(self, state: Mapping[str, Any], **of_snapshot: Any) -> None:
        """Copy a state and start writing it; does nothing after a failed save.

        Raises:
            CheckpointError: something in the state cannot be saved.
        """
        self.wait()
        if self.problem is None:
            started = time.monotonic()
            snapshot = self._buffers.copy(state, **of_snapshot)
            self._thread = threading.Thread(
                target=self._write, args=(snapshot, started), name="lockstep-checkpoint", daemon=True
            )
            self._thread.start()

    @property
    def writing(self) -> bool:
        """Whether files are being written."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Wait until nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, snapshot: Snapshot, started: float) -> None:
        try:
            if self._checkpoints is not None:
                self.saved = self.unreported = self._checkpoints.write(snapshot, self._writers)
            else:
                write_own_shard(snapshot, self._writers)
        except LockstepError as error:
            self.problem = str(error)
        except Exception as error:
            self.problem = f"step {snapshot.step} could not be saved: {type(error).__name__}: {error}"
        self.longest_seconds = max(self.longest_seconds, time.monotonic() - started)
