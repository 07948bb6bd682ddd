"""Lines of history: what a rollback has abandoned, recorded before the run goes on.

A rollback returns to a checkpoint and takes another way from there: some global batches are skipped, the learning rate may
be lowered. One atomic rename of ``rollbacks.json`` makes it so. A checkpoint of an earlier attempt that lies after the
rollback's target is abandoned: it is never read again, even if the process is killed before the new attempt has saved.
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
        attempt: number of the line of history that it begins.
        target_step: step of the checkpoint that it returns to.
        failed_step: the step that went wrong.
        reason: what went wrong.
        skipped: global batches that are left out from now on, as (epoch, batch).
        learning_rate_factor: what all learning rates are multiplied by from now on.
    """

    attempt: int
    target_step: int
    failed_step: int
    reason: str
    skipped: tuple[Cursor, ...]
    learning_rate_factor: float

    @classmethod
    def read(cls, entry: Mapping[str, Any]) -> Self:
        """Undo ``asdict`` and JSON."""
        read = cls(**{**entry, "skipped": tuple(Cursor(*cursor) for cursor in entry["skipped"])})
        whole = (read.attempt, read.target_step, read.failed_step, *(n for cursor in read.skipped for n in cursor))
        if not all(type(number) is int for number in whole) or not isinstance(read.learning_rate_factor, int | float):
            raise ValueError(f"{entry} is no rollback")
        return read

    def abandons(self, step: int, attempt: int) -> bool:
        """Tell whether a checkpoint lies on a line of history that this rollback left."""
        return attempt < self.attempt and step > self.target_step


class RollbackHistory:
    """The rollbacks of one run, in order.

    Args:
        folder: of the checkpoints.

    Raises:
        CheckpointError: the record is there but cannot be read; which checkpoints are good is then unknown.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self.rollbacks = self._read()

    def record(self, rollback: Rollback) -> None:
        """Make a rollback so, durably; checkpoints after its target are abandoned from here on."""
        written = [asdict(earlier) for earlier in (*self.rollbacks, rollback)]
        replace_file(self._path, json.dumps({"rollbacks": written}, indent=1))
        self.rollbacks.append(rollback)

    def abandoned(self, step: int, attempt: int) -> bool:
        """Tell whether a checkpoint must not be read any more."""
        return any(rollback.abandons(step, attempt) for rollback in self.rollbacks)

    def since(self, attempt: int) -> Iterable[Rollback]:
        """Return the rollbacks that a state of this attempt knows nothing of."""
        return [rollback for rollback in self.rollbacks if rollback.attempt > attempt]

    def _read(self) -> list[Rollback]:
        if not self._path.exists():
            return []
        try:
            written = json_files.read(self._path)["rollbacks"]
            return [Rollback.read(entry) for entry in written]
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{self._path} cannot be read ({error}); it tells which checkpoints were abandoned. Put it back, or remove it "
                "together with the checkpoints that are not to be continued"
            ) from error
