"""Rollback history: which checkpoints were abandoned. Recorded before training continues.

A rollback returns to a checkpoint and continues differently: some global batches are skipped, the learning rate may be
lowered. It takes effect with one atomic rename of ``rollbacks.json``. Checkpoints of earlier attempts after the rollback's
target are abandoned: never read again, even if the process is killed before the new attempt has saved.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from runtime import json_files
from runtime.data.batches import Cursor
from runtime.errors import CheckpointError
from runtime.state.durable_files import replace_file

FILE = "rollbacks.json"


@dataclass(frozen=True)
class Rollback:
    """One return to a checkpoint.

    Args:
        attempt: number of the attempt that it starts.
        target_step: step of the checkpoint that it returns to.
        failed_step: the step that diverged.
        reason: why.
        skipped: global batches skipped from now on, as (epoch, batch).
        learning_rate_factor: factor on all learning rates from now on.
    """

    attempt: int
    target_step: int
    failed_step: int
    reason: str
    skipped: tuple[Cursor, ...]
    learning_rate_factor: float

    @classmethod
    def read(cls, entry: Mapping[str, Any]) -> Self:
        """Parse an entry of ``rollbacks.json``, the inverse of ``asdict``."""
        read = cls(**{**entry, "skipped": tuple(Cursor(*cursor) for cursor in entry["skipped"])})
        integers = (read.attempt, read.target_step, read.failed_step, *(n for cursor in read.skipped for n in cursor))
        if not all(type(number) is int for number in integers) or not isinstance(
            read.learning_rate_factor, int | float
        ):
            raise ValueError(f"{entry} is not a rollback")
        return read

    def abandons(self, step: int, attempt: int) -> bool:
        """Whether this rollback abandoned a checkpoint."""
        return attempt < self.attempt and step > self.target_step


class RollbackHistory:
    """The rollbacks of one run, in order.

    Args:
        folder: the folder of checkpoints.

    Raises:
        CheckpointError: the record exists but cannot be read, so it is unknown which checkpoints are valid.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self.rollbacks = self._read()

    def record(self, rollback: Rollback) -> None:
        """Record a rollback durably; from here on checkpoints after its target are abandoned."""
        written = [asdict(earlier) for earlier in (*self.rollbacks, rollback)]
        replace_file(self._path, json.dumps({"rollbacks": written}, indent=1))
        self.rollbacks.append(rollback)

    def abandoned(self, step: int, attempt: int) -> bool:
        """Whether a checkpoint must no longer be read."""
        return any(rollback.abandons(step, attempt) for rollback in self.rollbacks)

    def since(self, attempt: int) -> Iterable[Rollback]:
        """Return the rollbacks recorded after this attempt started."""
        return [rollback for rollback in self.rollbacks if rollback.attempt > attempt]

    def _read(self) -> list[Rollback]:
        if not self._path.exists():
            return []
        try:
            written = json_files.read(self._path)["rollbacks"]
            return [Rollback.read(entry) for entry in written]
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{self._path} cannot be read ({error}); it records which checkpoints were abandoned. Restore it, or remove it "
                "together with the checkpoints that must not be resumed"
            ) from error
