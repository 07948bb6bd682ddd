"""The layout of a run folder: every module takes the paths from here. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

OUTCOME = "outcome.json"
_LOCKS = "fence-*.json"


@dataclass(frozen=True)
class RunFiles:
    """Paths in a run folder.

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
        """JSON lines: starts, training reports, evaluations."""
        return self.folder / "metrics.jsonl"

    @property
    def preprocessing(self) -> Path:
        """Preprocessing parameters fitted on the training data."""
        return self.folder / "preprocessing.json"

    @property
    def outcome(self) -> Path:
        """How the last launch ended."""
        return self.folder / OUTCOME

    @property
    def stop(self) -> Path:
        """Creating this file asks the run to save a checkpoint and exit."""
        return self.folder / "STOP"

    @property
    def checkpoints(self) -> Path:
        """Checkpoints."""
        return self.folder / "checkpoints"

    @property
    def figures(self) -> Path:
        """Tables and plots."""
        return self.folder / "figures"

    @property
    def logs(self) -> Path:
        """Logs written by a scheduler."""
        return self.folder / "logs"

    @property
    def jobs(self) -> Path:
        """Submitted jobs: script, YAML and a copy of the code."""
        return self.folder / "jobs"

    def locks(self) -> list[Path]:
        """Return the existing lock files, newest last."""
        return sorted(self.folder.glob(_LOCKS))
