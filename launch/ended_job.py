"""Decide whether a job that has ended is requeued, from the run's outcome: the same for every scheduler.

Exit codes are not enough: a rank that is preempted saves and exits with 0, and one that stops for a NaN exits with the same 1
as one whose neighbour's machine failed. So ``outcome.json`` decides; a run without one was killed. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_NOT_RUNNABLE = (126, 127)  # exit codes of a shell: not executable, not found


@dataclass(frozen=True)
class JobEnd:
    """How one start of a job ended.

    Args:
        outcome: content of ``outcome.json``; None if there is none.
        code: highest exit code of its processes.
        warned: why the job script asked the run to stop; empty if it did not.
        stop_file: whether there is a STOP file, from the user unless ``warned``.
        cancelled: whether the job was cancelled.
        restarts: number of restarts so far.
        max_requeues: limit of restarts.
        progressed: whether a checkpoint was written since the job last lost a process.
    """

    outcome: Mapping[str, Any] | None
    code: int
    warned: str = ""
    stop_file: bool = False
    cancelled: bool = False
    restarts: int = 0
    max_requeues: int = 20
    progressed: bool = True


@dataclass(frozen=True)
class RequeueDecision:
    """Whether to requeue a job, and why.

    Args:
        requeue: whether the job is requeued.
        why: the reason, for the log.
        exit_code: exit code of the job if it is not requeued.
        lost: whether the reason is lost processes; requeued only while there is progress.
    """

    requeue: bool
    why: str
    exit_code: int = 0
    lost: bool = False


def decide(ended: JobEnd) -> RequeueDecision:
    """Decide whether a job is requeued."""
    outcome = ended.outcome or {}
    kind, message = outcome.get("outcome"), str(outcome.get("message", "")).split("\n")[0]
    if kind == "finished":
        return RequeueDecision(requeue=False, why="finished")
    if ended.cancelled:
        saved = "saved, " if kind == "stopped" else ""
        return RequeueDecision(requeue=False, why=f"{saved}the job was cancelled", exit_code=75 if saved else 1)
    if kind == "stopped":
        return _within_limit(ended, _decide_stopped(ended, outcome))
    if kind == "failed" and outcome.get("repeats", True):
        why = f"the failure would repeat: {message}"
        return RequeueDecision(requeue=False, why=why, exit_code=int(outcome.get("exit_code", 1)))
    if kind is None and ended.code in (2, *_NOT_RUNNABLE):
        return RequeueDecision(requeue=False, why="the run could not be started; see its log", exit_code=2)
    why = f"processes were lost ({message or 'no outcome was written'})"
    if not ended.progressed:
        why = f"{why} again, with no new checkpoint since the last time"
        return RequeueDecision(requeue=False, why=why, exit_code=1)
    return _within_limit(ended, RequeueDecision(requeue=True, why=why, exit_code=1, lost=True))


def _decide_stopped(ended: JobEnd, outcome: Mapping[str, Any]) -> RequeueDecision:
    reason = outcome.get("reason")
    if not ended.warned and (ended.stop_file or reason == "SIGINT"):
        return RequeueDecision(requeue=False, why="stopped by the user", exit_code=75)
    return RequeueDecision(
        requeue=True, why=f"stopped: {ended.warned or reason or 'the job was asked to end'}", exit_code=75
    )


def _within_limit(ended: JobEnd, decision: RequeueDecision) -> RequeueDecision:
    if decision.requeue and ended.restarts >= ended.max_requeues:
        why = f"{decision.why}; this was the last of {ended.max_requeues} requeues (--max-requeues)"
        return RequeueDecision(requeue=False, why=why, exit_code=decision.exit_code)
    return decision
