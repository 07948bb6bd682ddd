"""What is to be started, wherever that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class JobSpec:
    """One run to start.

    Args:
        script: path of the entry point, such as ``runtime/train.py``.
        config: path of the YAML file, or of a run folder where the entry point takes one.
        overrides: ``key.path=value``, and the entry point's options.
        processes: in all.
        use_gpus: whether each process gets a GPU.
    """

    script: Path
    config: Path
    overrides: Sequence[str]
    processes: int
    use_gpus: bool
