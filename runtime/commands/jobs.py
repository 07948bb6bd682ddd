"""``lockstep jobs`` and ``lockstep stop``: what is in the cluster's queue, and a clean end for a run, wherever it runs."""

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
    """Add ``lockstep jobs`` and ``lockstep stop``."""
    jobs = commands.add_parser(
        "jobs",
        help="list one's runs in the cluster's queue",
        description="List one's runs in the cluster's queue, also those that ended lately.",
    )
    jobs.add_argument("--json", action="store_true", help="for scripts")
    jobs.set_defaults(run=_jobs)
    stop = commands.add_parser(
        "stop",
        help="let a run save and leave",
        description="Ask a run to save and leave, on this machine or on others that share its folder, and wait until it has. "
        "A job that is still waiting in the cluster's queue is cancelled. The same command, or submission, goes on with it.",
        epilog="exit code: 0 stopped; 1 nothing to stop, or it has not in time",
    )
    stop.add_argument("folder", metavar="RUN", type=Path, help="run folder")
    stop.add_argument(
        "--timeout", metavar="SECONDS", type=count, default=600, help="longest wait for it (default: 600)"
    )
    stop.set_defaults(run=_stop)


def last_step(run: Path) -> int | None:
    """Return the last step that a run has reported, from the end of its record."""
    with suppress(OSError), RunFiles(run).metrics.open("rb") as file:
        file.seek(max(0, file.seek(0, 2) - _TAIL_BYTES))
        found = re.findall(rb'"step": (\d+)', file.read())
        return int(found[-1]) if found else None
    return None


def _jobs(options: argparse.Namespace) -> int:
    asked = [scheduler for scheduler in schedulers.SCHEDULERS if scheduler.has_queue]
    if not asked:
        programs = " or ".join(
            scheduler.queue_command for scheduler in schedulers.SCHEDULERS if scheduler.queue_command
        )
        raise SchedulerError(f"there is no {programs} here: ask on a machine of the cluster")
    jobs = [job for scheduler in asked for job in scheduler.queued()]
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
        raise RunFolderError(f"{options.folder} is no run folder")
    released = _is_released(run)
    if not released:
        RunFiles(run).stop.touch()  # at once: a scheduler that is away takes a while to say so
    try:
        jobs = _active_jobs(run)
    except SchedulerError as error:
        if released:
            what = f"nothing to stop here: no process writes to {run}; whether a job of it is queued cannot be told"
            raise SchedulerError(f"{what}: {error}") from error
        _LOGGER.warning("%s; if this run is a job, it may be requeued", error)
        return _stopped(run, options.timeout, over=lambda: _is_released(run))
    if jobs:
        return 0 if _cancel_waiting(run) else _stopped(run, options.timeout, over=lambda: _is_over(run))
    if released:
        raise RunFolderError(f"nothing to stop: no job of {run} is in the queue, and no process writes to it")
    return _stopped(run, options.timeout, over=lambda: _is_released(run))


def _is_over(run: Path) -> bool:
    """Tell whether no job of a run is left; where the queue cannot be asked for a while, whether nobody writes to it."""
    try:
        return _cancel_waiting(run)
    except SchedulerError:
        return _is_released(run)


def _cancel_waiting(run: Path) -> bool:
    """Cancel those jobs of a run that have not begun, or have gone back to the queue; return whether no other is left."""
    jobs = _active_jobs(run)
    waiting = [(scheduler, job.number) for scheduler, job in jobs if job.waiting]
    for scheduler in dict.fromkeys(scheduler for scheduler, _ in waiting):
        numbers = [number for owner, number in waiting if owner is scheduler]
        scheduler.cancel(numbers)
        print(f"cancelled, as it was waiting: job {', '.join(numbers)}")
    return len(jobs) == len(waiting)


def _stopped(run: Path, timeout: int, *, over: Callable[[], bool]) -> int:
    """Ask by the file until it is over; again and again, since a run that is only starting takes it for left over."""
    stop_file = RunFiles(run).stop
    until = time.monotonic() + timeout
    while not over():
        if time.monotonic() > until:
            _LOGGER.warning("%s has not stopped within %d s; it was asked to", run, timeout)
            return 1
        stop_file.touch()
        time.sleep(_POLL_SECONDS)
    with suppress(OSError, ValueError, LookupError, TypeError):
        outcome = json_files.read(RunFiles(run).outcome)
        print(f"{outcome['outcome']} at step {outcome.get('step', last_step(run))}: {run}")
        return 0 if outcome["outcome"] in ("stopped", "finished") else 1
    print(f"ended, and no outcome was written: {run}")
    return 1


def _active_jobs(run: Path) -> list[tuple[ClusterScheduler, QueuedJob]]:
    asked = [scheduler for scheduler in schedulers.SCHEDULERS if scheduler.has_queue]
    found = [(scheduler, job) for scheduler in asked for job in scheduler.queued()]
    return [(scheduler, job) for scheduler, job in found if job.active and job.run == run]


def _is_released(run: Path) -> bool:
    """Tell whether nobody claims to write to a run folder: its newest lock is released, or there is none."""
    locks = RunFiles(run).locks()
    try:
        return not locks or bool(json_files.read(locks[-1])["released"])
    except (OSError, ValueError, LookupError, TypeError):
        return False  # being written
