"""Whether a job that has ended is to go on, decided from what the run has left: the same for every scheduler.

The exit codes of processes say little: a rank that is preempted saves and leaves with 0, and one that stops for a NaN leaves
with the same 1 as one whose neighbour's machine caught fire. So what the run itself has left in ``outcome.json`` decides, and
where it could leave nothing, it was killed. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_NOT_RUNNABLE = (126, 127)  # a shell's words for a program that is not there, or is none


@dataclass(frozen=True)
class JobEnd:
    """How one start of a job ended.

    Args:
        outcome: what the run left; None if nothing.
        code: highest exit code of its processes.
        warned: why the job script asked it to stop; empty if it did not.
        stop_file: whether somebody else did, by the file.
        cancelled: whether the job was.
        restarts: how often it was started again before.
        max_requeues: how often it may be.
        progressed: whether there is a checkpoint that was not there when the job last lost a process.
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
    """What follows.

    Args:
        requeue: whether the job is to be started again.
        lost: whether that is because processes were lost, which may go on only as long as there is progress.
        why: in words.
        exit_code: of the job, where it is not.
    """

    requeue: bool
    why: str
    exit_code: int = 0
    lost: bool = False


def judge(ended: JobEnd) -> RequeueDecision:
    """Decide whether a job is to go on."""
    outcome = ended.outcome or {}
    kind, message = outcome.get("outcome"), str(outcome.get("message", "")).split("\n")[0]
    if kind == "finished":
        return RequeueDecision(requeue=False, why="finished")
    if ended.cancelled:
        left = "saved, " if kind == "stopped" else ""
        return RequeueDecision(requeue=False, why=f"{left}the job was cancelled", exit_code=75 if left else 1)
    if kind == "stopped":
        return _within_limit(ended, _judge_stopped(ended, outcome))
    if kind == "failed" and outcome.get("repeats", True):
        why = f"the failure would repeat: {message}"
        return RequeueDecision(requeue=False, why=why, exit_code=int(outcome.get("exit_code", 1)))
    if kind is None and ended.code in (2, *_NOT_RUNNABLE):
        return RequeueDecision(requeue=False, why="the run could not be started; its log says why", exit_code=2)
    why = f"processes were lost ({message or 'they left no word'})"
    if not ended.progressed:
        why = f"{why}, as before, and there is no checkpoint since"
        return RequeueDecision(requeue=False, why=why, exit_code=1)
    return _within_limit(ended, RequeueDecision(requeue=True, why=why, exit_code=1, lost=True))


def _judge_stopped(ended: JobEnd, outcome: Mapping[str, Any]) -> RequeueDecision:
    reason = outcome.get("reason")
    if not ended.warned and (ended.stop_file or reason == "SIGINT"):
        return RequeueDecision(requeue=False, why="stopped by the user", exit_code=75)
    return RequeueDecision(
        requeue=True, why=f"stopped: {ended.warned or reason or 'the job was asked to end'}", exit_code=75
    )


def _within_limit(ended: JobEnd, verdict: RequeueDecision) -> RequeueDecision:
    if verdict.requeue and ended.restarts >= ended.max_requeues:
        why = f"{verdict.why}; this was the last of {ended.max_requeues} requeues (--max-requeues)"
        return RequeueDecision(requeue=False, why=why, exit_code=verdict.exit_code)
    return verdict
