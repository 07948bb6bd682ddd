"""PBS's queue, by qstat's JSON. A job is known as ours by a variable that holds its run folder."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

from launch.cluster_scheduler import QueuedJob
from runtime.errors import SchedulerError

from .script import RUN

_WAITING = ("Q", "H", "W", "T")
_ENDED = ("F", "X")


def queued() -> list[QueuedJob]:
    """Return one's own jobs of Lockstep; see :class:`launch.cluster_scheduler.ClusterScheduler`."""
    return parsed(_asked("qstat", "-x", "-f", "-F", "json"))


def parsed(text: str) -> list[QueuedJob]:
    """Read the answer of qstat."""
    jobs = json.loads(text, strict=False).get("Jobs", {})
    return [_parsed(number, job) for number, job in jobs.items() if RUN in job.get("Variable_List", {})]


def _parsed(number: str, job: dict[str, dict[str, str]]) -> QueuedJob:
    state = str(job["job_state"])
    return QueuedJob(
        number=number,
        state=state,
        elapsed=job.get("resources_used", {}).get("walltime", ""),
        limit=job.get("Resource_List", {}).get("walltime", ""),
        nodes=str(job.get("Resource_List", {}).get("nodect", "")),
        reason=str(job.get("comment", "")),
        run=Path(job["Variable_List"][RUN]),
        waiting=state in _WAITING,
        active=state not in _ENDED,
    )


def cancel(jobs: Sequence[str]) -> None:
    """Take jobs out of the queue."""
    _asked("qdel", *jobs)


def requeue(job: str) -> None:
    """Put a job back into the queue."""
    _asked("qrerun", job)


def submit(path: Path) -> str:
    """Submit a script; return the job's id."""
    return _asked("qsub", str(path)).strip()


def _asked(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SchedulerError(f"{command[0]} cannot be asked: {error}") from error
    if done.returncode != 0:
        raise SchedulerError(f"{command[0]} refuses: {done.stderr.strip()}")
    return done.stdout
