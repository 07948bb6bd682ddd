"""Slurm's queue. A job is known by its comment, which holds the run folder. Nothing else is kept: the queue is the record."""

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
_SECONDS = 20.0  # longest wait for squeue; a controller that is away lets it try for minutes


def queued() -> list[QueuedJob]:
    """Return one's own jobs that Lockstep submitted, the ended ones that Slurm still knows of too.

    Raises:
        SchedulerError: Slurm does not answer.
    """
    line = ["squeue", "--me", "--states=all", "--noheader", "--format=%i|%T|%M|%l|%D|%r|%k"]
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise SchedulerError(f"squeue does not answer within {_SECONDS:g} s") from error
    except OSError as error:
        raise SchedulerError(f"squeue cannot be asked: {error}") from error
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no reason is given"])[-1]
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
    """Take jobs out of the queue."""
    subprocess.run(["scancel", *jobs], check=False)
