"""``outcome.json``: how a launch ended, for the launcher, the scheduler and ``lockstep stop``.

Needed because ``accelerate launch`` does not pass on exit codes.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from runtime import environment, json_files


def read_outcome(path: Path, launch: str) -> dict[str, Any] | None:
    """Return the outcome of this launch, or None if it wrote none."""
    try:
        outcome: dict[str, Any] = json_files.read(path)
    except (OSError, ValueError):
        return None
    return outcome if isinstance(outcome, dict) and outcome.get("launch") == launch else None


def write_launch_outcome(outcome: dict[str, Any]) -> None:
    """Write the outcome to the launcher's file (local rank 0 only)."""
    if environment.local_rank() == 0:
        write_outcome(environment.outcome_file(), outcome)


def write_outcome(path: Path | None, outcome: dict[str, Any]) -> None:
    """Write the outcome for the launcher; does nothing without a path or if its folder is missing."""
    if path is None or not path.parent.is_dir():
        return
    from runtime.state.durable_files import replace_file

    with suppress(OSError):  # disk full or gone: the run's error message reports it
        replace_file(path, json.dumps({**outcome, "launch": environment.launch_token()}))
