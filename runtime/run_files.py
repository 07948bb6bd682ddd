"""The files of a run folder, by name. Whoever reads or writes one takes its path from here; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

OUTCOME = "outcome.json"
_LOCKS = "fence-*.json"


@dataclass(frozen=True)
class RunFiles:
    """The paths within a run folder.

    Args:
        folder: the run folder (``output`` in the YAML).
    """

    folder: Path

    @property
    def config(self) -> Path:
        """The resolved configuration of the last start."""
        return self.folder / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON record a line: starts, reports of training, evaluations."""
        return self.folder / "metrics.jsonl"

    @property
    def preprocessing(self) -> Path:
        """What preprocessing was fitted on the training data."""
        return self.folder / "preprocessing.json"

    @property
    def outcome(self) -> Path:
        """How the last launch ended."""
        return self.folder / OUTCOME

    @property
    def stop(self) -> Path:
        """The file that asks the run to save and exit."""
        return self.folder / "STOP"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.folder / "checkpoints"

    @property
    def figures(self) -> Path:
        """The folder of tables and pictures."""
        return self.folder / "figures"

    @property
    def logs(self) -> Path:
        """The folder of logs that a scheduler writes."""
        return self.folder / "logs"

    @property
    def jobs(self) -> Path:
        """The folder of submitted jobs: script, YAML and a copy of the code."""
        return self.folder / "jobs"

    def locks(self) -> list[Path]:
        """Return the lock files that are there, the newest last."""
        return sorted(self.folder.glob(_LOCKS))
