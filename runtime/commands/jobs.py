"""``lockstep jobs`` and ``lockstep stop``: list the cluster's queue, and stop a run cleanly, wherever it runs."""

from __future__ import annotations

import argparse
import json
import logging
import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from launch import schedulers
from launch.cluster_scheduler import ClusterScheduler, QueuedJob
from runtime import json_files
from runtime.arguments import count
from runtime.errors import RunFolderError, SchedulerError
from runtime.run_files import RunFiles

_LOGGER = logging.getLogger("lockstep.jobs")
_POLL_SECONDS = 1.0
_TAIL_BYTES = 1 << 16


def add_jobs(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``jobs`` and ``stop``."""
    jobs = commands.add_parser(
        "jobs",
        help="list your runs in the cluster's queue",
        description="List your runs in the cluster's queue, recently ended ones included.",
    )
    jobs.add_argument("--json", action="store_true", help="print JSON, for scripts")
    jobs.set_defaults(run=_jobs)
    stop = commands.add_parser(
        "stop",
        help="ask a run to save a checkpoint and exit",
        description="Ask a run to save a checkpoint and exit, on this machine or on others that share its folder, and wait for "
        "it. A job that is still waiting in the cluster's queue is cancelled. The same command, or submission, resumes it.",
        epilog="exit code: 0 stopped; 1 nothing to stop, or it did not stop in time",
    )
    stop.add_argument("folder", metavar="RUN", type=Path, help="run folder")
    stop.add_argument(
        "--timeout", metavar="SECONDS", type=count, default=600, help="longest time to wait (default: 600)"
    )
    stop.set_defaults(run=_stop)


def last_step(run: Path) -> int | None:
    """Return the last step in a run's ``metrics.jsonl``, read from the end of the file; None if there is none."""
    with suppress(OSError), RunFiles(run).metrics.open("rb") as file:
        file.seek(max(0, file.seek(0, 2) - _TAIL_BYTES))
        steps = re.findall(rb'"step": (\d+)', file.read())
        return int(steps[-1]) if steps else None
    return None


def _jobs(options: argparse.Namespace) -> int:
    installed = _installed()
    if not installed:
        programs = " or ".join(
            scheduler.queue_command for scheduler in schedulers.SCHEDULERS if scheduler.queue_command
        )
        raise SchedulerError(f"{programs} is not installed here; run this command on a machine of the cluster")
    jobs = [job for scheduler in installed for job in scheduler.queued()]
    if options.json:
        print(json.dumps([{**job.as_json(), "step": last_step(job.run)} for job in jobs], indent=2))
        return 0
    rows = [("JOB", "STATE", "NODES", "TIME", "LIMIT", "STEP", "RUN")]
    for job in jobs:
        step = last_step(job.run)
        state = f"{job.state} ({job.reason})" if job.waiting else job.state
        rows.append(
            (job.number, state, job.nodes, job.elapsed, job.limit, "" if step is None else str(step), str(job.run))
        )
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    for row in rows:
        print("  ".join([*(text.ljust(width) for text, width in zip(row, widths, strict=False)), row[6]]))
    return 0


def _stop(options: argparse.Namespace) -> int:
    run = options.folder.absolute()
    if not run.is_dir():
        raise RunFolderError(f"{options.folder} is not a run folder")
    released = _is_released(run)
    if not released:
        RunFiles(run).stop.touch()  # at once: a scheduler that is down takes a while to fail
    try:
        jobs = _active_jobs(run)
    except SchedulerError as error:
        if released:
            what = f"nothing to stop here: no process writes to {run}; the queue could not be searched for its jobs"
            raise SchedulerError(f"{what}: {error}") from error
        _LOGGER.warning("%s; if this run is a job, it may be requeued", error)
        return _stopped(run, options.timeout, over=lambda: _is_released(run))
    if jobs:
        return 0 if _cancel_waiting(run) else _stopped(run, options.timeout, over=lambda: _is_over(run))
    if released:
        raise RunFolderError(f"nothing to stop: no job of {run} is in the queue, and no process writes to it")
    return _stopped(run, options.timeout, over=lambda: _is_released(run))


def _is_over(run: Path) -> bool:
    """Return whether no job of a run is left; if the queue does not answer, whether no process writes to the run."""
    try:
        return _cancel_waiting(run)
    except SchedulerError:
        return _is_released(run)


def _cancel_waiting(run: Path) -> bool:
    """Cancel the jobs of a run that wait in the queue, requeued ones included; return whether no other job is left."""
    jobs = _active_jobs(run)
    waiting = [(scheduler, job.number) for scheduler, job in jobs if job.waiting]
    for scheduler in dict.fromkeys(scheduler for scheduler, _ in waiting):
        numbers = [number for owner, number in waiting if owner is scheduler]
        scheduler.cancel(numbers)
        print(f"cancelled while waiting in the queue: job {', '.join(numbers)}")
    return len(jobs) == len(waiting)


def _stopped(run: Path, timeout: int, *, over: Callable[[], bool]) -> int:
    """Touch the STOP file until the run is over: a run that is still starting removes it as left over."""
    stop_file = RunFiles(run).stop
    until = time.monotonic() + timeout
    while not over():
        if time.monotonic() > until:
            _LOGGER.warning("%s was asked to stop, and has not within %d s", run, timeout)
            return 1
        stop_file.touch()
        time.sleep(_POLL_SECONDS)
    with suppress(OSError, ValueError, LookupError, TypeError):
        outcome = json_files.read(RunFiles(run).outcome)
        print(f"{outcome['outcome']} at step {outcome.get('step', last_step(run))}: {run}")
        return 0 if outcome["outcome"] in ("stopped", "finished") else 1
    print(f"ended without writing an outcome: {run}")
    return 1


def _active_jobs(run: Path) -> list[tuple[ClusterScheduler, QueuedJob]]:
    queued = [(scheduler, job) for scheduler in _installed() for job in scheduler.queued()]
    return [(scheduler, job) for scheduler, job in queued if job.active and job.run == run]


def _installed() -> list[ClusterScheduler]:
    return [scheduler for scheduler in schedulers.SCHEDULERS if scheduler.has_queue]


def _is_released(run: Path) -> bool:
    """Return whether no process holds the lock of a run folder: its newest lock is released, or there is none."""
    locks = RunFiles(run).locks()
    try:
        return not locks or bool(json_files.read(locks[-1])["released"])
    except (OSError, ValueError, LookupError, TypeError):
        return False  # the lock file is being written
