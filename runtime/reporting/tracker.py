"""The tracker interface: a destination of a run's figures, such as a file, a terminal or a server. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.evaluation.metrics import Result


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """The run that a tracker follows.

    Args:
        name: as configured.
        id: unique to the run, and the same at every start of it.
        folder: the run folder, which exists.
        configuration: the resolved configuration, without secrets.
        step: steps completed before this start; 0 unless the run is resumed.
    """

    name: str
    id: str
    folder: Path
    configuration: Mapping[str, Any]
    step: int


class Tracker:
    """Base class of trackers. Every method does nothing by default: a tracker overrides those that it needs.

    Only rank 0 constructs and calls trackers, while the other ranks wait. A tracker that raises does not end the run: the run
    warns once and stops calling it. The methods are called in this order: ``start``, ``log_summary``, any of the others,
    ``finish``.
    """

    def start(self, run: TrackedRun) -> None:
        """Open the destination. A resumed run calls this again, with the same ``run.id`` and ``run.folder``."""

    def log_summary(self, values: Mapping[str, Any]) -> None:
        """Log the facts of this start of the run: text, numbers, versions; all of it serialisable as JSON."""

    def log(self, values: Mapping[str, Result], *, step: int, epoch: int, split: str) -> None:
        """Log a training report or the results of an evaluation.

        Args:
            values: by name: numbers, and lists of numbers (values per class, matrices, curves); see :func:`scalars`.
            step: global batches consumed, from 1.
            epoch: of the step, from 1.
            split: ``train``, ``validation`` or ``test``.
        """

    def log_figure(self, name: str, path: Path, *, step: int, split: str) -> None:
        """Log a picture of an evaluation: a PNG file, which later evaluations may remove."""

    def log_artifact(self, name: str, path: Path, *, step: int) -> None:
        """Log a complete file of the run folder, such as ``config.yaml``, made after ``step`` steps."""

    def log_checkpoint(self, name: str, *, step: int, digest: str) -> None:
        """Log that a checkpoint is on disk.

        Args:
            name: of its folder.
            step: steps completed when it was saved; later ones may be completed by now.
            digest: of its state; equal digests mean equal weights, optimizer state and buffers, bit for bit.
        """

    def log_message(self, text: str) -> None:
        """Log one line of text; a warning begins with ``warning:``. It is also printed, not by trackers."""

    def rewind(self, step: int) -> None:
        """Drop everything after this step: the run was rolled back to it, and repeats the later steps."""

    def finish(self, outcome: str) -> None:
        """Close; ``outcome`` is ``finished``, ``stopped`` (the run can be resumed) or ``failed``. Called once."""


def scalars(values: Mapping[str, Result]) -> dict[str, float]:
    """Return the values that are single numbers."""
    return {name: float(value) for name, value in values.items() if isinstance(value, int | float)}
