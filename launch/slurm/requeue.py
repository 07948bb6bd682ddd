"""Decide whether a Slurm job that has ended is requeued: the last step of the job script, on the machine of rank 0.

The rules are in :mod:`launch.ended_job`. Imports no torch.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.ended_job import JobEnd, RequeueDecision, decide
from runtime import json_files
from runtime.arguments import clock_seconds
from runtime.errors import SchedulerError
from runtime.messages import shown_messages
from runtime.outcome import read_outcome
from runtime.run_files import RunFiles

_LOGGER = logging.getLogger("lockstep.requeue")
_ENDED_TASK = re.compile(r"^srun: error: .*?: tasks? (\d+)", re.MULTILINE)
_RANK_IN_MESSAGE = re.compile(r"rank (\d+) \(host ")
_LAST_LINES = 15


def first_failed(srun_log: Path, message: str = "") -> int | None:
    """Return the rank that failed first, from the run's message or else from srun's log; None if none did."""
    if in_message := _RANK_IN_MESSAGE.match(message):
        return int(in_message[1])
    in_log = _ENDED_TASK.search(srun_log.read_text(errors="replace")) if srun_log.exists() else None
    return int(in_log[1]) if in_log else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Decide about a job that has ended, and requeue it if so; return the job's exit code, 75 if it was requeued."""
    with shown_messages(always=True):
        return _decide(_parser().parse_args(arguments))


def _decide(options: argparse.Namespace) -> int:
    run, logs, restart = Path(options.run), Path(options.logs), int(options.launch.rpartition("-")[2])
    files, history = RunFiles(run), logs / "requeues.jsonl"
    newest, outcome = _newest_checkpoint(run), read_outcome(files.outcome, options.launch)
    job = dict(re.findall(r"(\w+)=(\S*)", _run("scontrol", "-o", "show", "job", options.job).stdout))
    decision = decide(
        JobEnd(
            outcome=outcome,
            code=options.code,
            warned=options.warned,
            stop_file=files.stop.exists(),
            cancelled=_is_cancelled(job),
            restarts=restart,
            max_requeues=options.max_requeues,
            progressed=newest not in [record["checkpoint"] for record in _records(history) if record["lost"]],
        )
    )
    by_slurm = int(job.get("Restarts") or 0) > restart
    if by_slurm:  # a node was lost, or the grace time of a preemption is over; it cannot be undone here
        decision = RequeueDecision(requeue=True, why="Slurm requeued it")
    _log(decision, logs / f"restart-{restart}", outcome)
    if not decision.requeue:
        return decision.exit_code
    with history.open("a") as file:
        file.write(json.dumps({"why": decision.why, "lost": decision.lost, "checkpoint": newest}) + "\n")
    files.stop.unlink(missing_ok=True)
    try:
        if not by_slurm:
            requeue(options.job)
    except SchedulerError as error:
        _LOGGER.warning("%s; submit the run again to resume it", error)
    return 75


def requeue(job: str) -> None:
    """Put a job back into the queue.

    Raises:
        SchedulerError: Slurm refuses.
    """
    done = _run("scontrol", "requeue", job)
    if done.returncode != 0:
        raise SchedulerError(f"the job cannot be requeued ({done.stderr.strip()})")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m launch.slurm.requeue", description=__doc__)
    parser.add_argument("run")
    parser.add_argument("--logs", required=True)
    parser.add_argument("--launch", required=True, help="JOB-RESTART")
    parser.add_argument("--job", required=True)
    parser.add_argument("--code", type=int, required=True)
    parser.add_argument("--warned", default="")
    parser.add_argument("--max-requeues", type=int, required=True)
    return parser


def _log(decision: RequeueDecision, ranks: Path, outcome: Mapping[str, Any] | None) -> None:
    """Log the last lines of the rank that failed first, then the decision: logs are read from the end."""
    rank = first_failed(ranks / "srun.log", str((outcome or {}).get("message", "")))
    log = ranks / f"rank-{rank}.log"
    if decision.exit_code not in (0, 75) and rank is not None and log.exists():
        lines = log.read_text(errors="replace").splitlines()[-_LAST_LINES:]
        _LOGGER.warning("%s", "\n".join([f"rank {rank} failed first; its last lines ({log}):", *lines]))
    action = "is requeued" if decision.requeue else "is not requeued"
    _LOGGER.info("the job %s: %s", action, decision.why)


def _newest_checkpoint(run: Path) -> str:
    """Return the name of the newest complete checkpoint, or ''. Contents are not verified: a name shows progress."""
    names = [path.name for path in RunFiles(run).checkpoints.glob("step-*")]
    return max((name for name in names if ".partial-" not in name and ".damaged-" not in name), default="")


def _records(history: Path) -> list[dict[str, Any]]:
    return [json_files.parse(line) for line in history.read_text().splitlines()] if history.exists() else []


def _is_cancelled(job: Mapping[str, str]) -> bool:
    """Return whether a job was cancelled, rather than ended by its time limit, from ``scontrol show job``.

    A job that Slurm ends, for whatever reason, is COMPLETING while its last processes end. One that ends by itself, or is
    preempted and has its grace time, is RUNNING until the end.
    """
    timed_out = (
        (clock_seconds(job.get("RunTime", "")) or 0) >= (clock_seconds(job.get("TimeLimit", "")) or 0) > 0
    )  # or UNLIMITED
    return job.get("JobState") in ("CANCELLED", "COMPLETING") and not timed_out


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))


if __name__ == "__main__":
    sys.exit(main())
