"""Slurm's queue. Jobs are recognised by their comment, which holds the run folder; no other record is kept."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from launch.cluster_scheduler import QueuedJob
from launch.slurm.script import COMMENT
from runtime.errors import SchedulerError

_ACTIVE = (
    "PENDING",
    "CONFIGURING",
    "RUNNING",
    "COMPLETING",
    "SUSPENDED",
    "REQUEUED",
    "RESIZING",
    "SIGNALING",
    "STAGE_OUT",
)
_TIMEOUT_SECONDS = 20.0  # squeue retries for minutes if the controller is down


def queued() -> list[QueuedJob]:
    """Return the user's jobs that Lockstep submitted, including ended ones that Slurm still lists.

    Raises:
        SchedulerError: Slurm does not answer.
    """
    line = ["squeue", "--me", "--states=all", "--noheader", "--format=%i|%T|%M|%l|%D|%r|%k"]
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise SchedulerError(f"squeue does not answer within {_TIMEOUT_SECONDS:g} s") from error
    except OSError as error:
        raise SchedulerError(f"squeue cannot be run: {error}") from error
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise SchedulerError(f"squeue does not answer: {reason}")
    rows = [row.split("|", 6) for row in done.stdout.splitlines() if row.count("|") >= 6]
    return [
        QueuedJob(
            number,
            state,
            elapsed,
            limit,
            nodes,
            reason,
            Path(comment.removeprefix(COMMENT)),
            waiting=state == "PENDING",
            active=state in _ACTIVE,
        )
        for number, state, elapsed, limit, nodes, reason, comment in rows
        if comment.startswith(COMMENT)
    ]


def cancel(jobs: Sequence[str]) -> None:
    """Cancel jobs."""
    subprocess.run(["scancel", *jobs], check=False)
