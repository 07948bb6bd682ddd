"""What a tracker is: somewhere that a run's figures go, such as a file, a terminal or a server. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.evaluation.metrics import Result


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """The run that a tracker is to follow.

    Args:
        name: as configured.
        id: the same at every start of the run, and unlike that of any other.
        folder: the run folder, which is there.
        configuration: the resolved configuration, without secrets.
        step: steps that the run has behind it; 0 unless it is resumed.
    """

    name: str
    id: str
    folder: Path
    configuration: Mapping[str, Any]
    step: int


class Tracker:
    """Takes what a run reports. Every method does nothing by default: a tracker overrides those that it needs.

    Rank 0 alone makes trackers and calls them, while the other ranks wait. A tracker that raises ends no run: the run warns of
    it once and calls it no more. The methods are called in this order: ``start``, ``log_summary``, any of the others,
    ``finish``.
    """

    def start(self, run: TrackedRun) -> None:
        """Open what is written to. A resumed run starts again, with the same ``run.id`` and ``run.folder``."""

    def log_summary(self, values: Mapping[str, Any]) -> None:
        """Take what this start of the run is: texts for people, numbers, versions; all of it can be written as JSON."""

    def log(self, values: Mapping[str, Result], *, step: int, epoch: int, split: str) -> None:
        """Take a report of training or the results of an evaluation.

        Args:
            values: by name: numbers, and lists of numbers (values per class, matrices, curves); see :func:`scalars`.
            step: global batches consumed, from 1.
            epoch: that the step belongs to, from 1.
            split: ``train``, ``validation`` or ``test``.
        """

    def log_figure(self, name: str, path: Path, *, step: int, split: str) -> None:
        """Take a picture of an evaluation: a PNG file, which later evaluations may remove."""

    def log_artifact(self, name: str, path: Path, *, step: int) -> None:
        """Take a file of the run folder that is complete, such as ``config.yaml``, made after ``step`` steps."""

    def log_message(self, text: str) -> None:
        """Take one line for people; a warning begins with ``warning:``. Printing it is not a tracker's affair."""

    def rewind(self, step: int) -> None:
        """Forget what came after this step: the run goes back to it, and takes later steps again."""

    def finish(self, outcome: str) -> None:
        """Close; ``outcome`` is ``finished``, ``stopped`` (the run can be resumed) or ``failed``. Called once."""


def scalars(values: Mapping[str, Result]) -> dict[str, float]:
    """Return those of the values that are single numbers."""
    return {name: float(value) for name, value in values.items() if isinstance(value, int | float)}
