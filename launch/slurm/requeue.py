"""Whether a job that has ended is to go on: the last thing that a job script asks, on the machine of rank 0.

The exit codes of processes say little: a rank that is preempted saves and leaves with 0, and one that stops for a NaN leaves
with the same 1 as one whose neighbour's machine caught fire. So what the run itself has left in ``outcome.json`` decides, and
where it could leave nothing, it was killed. Imports no torch.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime import json_files
from runtime.outcome import read_outcome
from runtime.run_files import RunFiles

_NOT_RUNNABLE = (126, 127)  # a shell's words for a program that is not there, or is none
_ENDED_TASK = re.compile(r"^srun: error: .*?: tasks? (\d+)", re.MULTILINE)
_NAMED_RANK = re.compile(r"rank (\d+) \(host ")
_LAST_LINES = 15


@dataclass(frozen=True)
class Ended:
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
class Verdict:
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


def judge(ended: Ended) -> Verdict:
    """Decide whether a job is to go on."""
    outcome = ended.outcome or {}
    kind, message = outcome.get("outcome"), str(outcome.get("message", "")).split("\n")[0]
    if kind == "finished":
        return Verdict(requeue=False, why="finished")
    if ended.cancelled:
        left = "saved, " if kind == "stopped" else ""
        return Verdict(requeue=False, why=f"{left}the job was cancelled", exit_code=75 if left else 1)
    if kind == "stopped":
        return _within_limit(ended, _judge_stopped(ended, outcome))
    if kind == "failed" and outcome.get("repeats", True):
        why = f"the failure would repeat: {message}"
        return Verdict(requeue=False, why=why, exit_code=int(outcome.get("exit_code", 1)))
    if kind is None and ended.code in (2, *_NOT_RUNNABLE):
        return Verdict(requeue=False, why="the run could not be started; its log says why", exit_code=2)
    why = f"processes were lost ({message or 'they left no word'})"
    if not ended.progressed:
        why = f"{why}, as before, and there is no checkpoint since"
        return Verdict(requeue=False, why=why, exit_code=1)
    return _within_limit(ended, Verdict(requeue=True, why=why, exit_code=1, lost=True))


def _judge_stopped(ended: Ended, outcome: Mapping[str, Any]) -> Verdict:
    reason = outcome.get("reason")
    if not ended.warned and (ended.stop_file or reason == "SIGINT"):
        return Verdict(requeue=False, why="stopped by the user", exit_code=75)
    return Verdict(requeue=True, why=f"stopped: {ended.warned or reason or 'the job was asked to end'}", exit_code=75)


def _within_limit(ended: Ended, verdict: Verdict) -> Verdict:
    if verdict.requeue and ended.restarts >= ended.max_requeues:
        why = f"{verdict.why}; this was the last of {ended.max_requeues} requeues (--max-requeues)"
        return Verdict(requeue=False, why=why, exit_code=verdict.exit_code)
    return verdict


def first_ended(srun_log: Path, message: str = "") -> int | None:
    """Return the rank that was the first to end badly, as the run's own message or else srun tells it; None if none did."""
    if named := _NAMED_RANK.match(message):
        return int(named[1])
    found = _ENDED_TASK.search(srun_log.read_text(errors="replace")) if srun_log.exists() else None
    return int(found[1]) if found else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Judge a job that has ended, and requeue it. Returns the job's exit code, 75 also where it was requeued."""
    options = _parser().parse_args(arguments)
    run, logs, restart = Path(options.run), Path(options.logs), int(options.launch.rpartition("-")[2])
    files, history = RunFiles(run), logs / "requeues.jsonl"
    newest, outcome = _newest_checkpoint(run), read_outcome(files.outcome, options.launch)
    job = dict(re.findall(r"(\w+)=(\S*)", _asked("scontrol", "-o", "show", "job", options.job).stdout))
    verdict = judge(
        Ended(
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
    if by_slurm:  # a node is lost, or the grace time of a preemption is over; nothing else could be done about it here
        verdict = Verdict(requeue=True, why="Slurm itself put it back")
    _tell(verdict, logs / f"restart-{restart}", outcome)
    if not verdict.requeue:
        return verdict.exit_code
    with history.open("a") as file:
        file.write(json.dumps({"why": verdict.why, "lost": verdict.lost, "checkpoint": newest}) + "\n")
    files.stop.unlink(missing_ok=True)
    done = _asked("scontrol", "requeue", options.job) if not by_slurm else None
    if done is not None and done.returncode != 0:
        print(
            f"lockstep: the job cannot be requeued ({done.stderr.strip()}); submit it again to go on", file=sys.stderr
        )
    return 75


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


def _tell(verdict: Verdict, ranks: Path, outcome: Mapping[str, Any] | None) -> None:
    """Say what becomes of the job, after the last lines of the rank that ended first: a log is read from its end."""
    rank = first_ended(ranks / "srun.log", str((outcome or {}).get("message", "")))
    log = ranks / f"rank-{rank}.log"
    if verdict.exit_code not in (0, 75) and rank is not None and log.exists():
        lines = log.read_text(errors="replace").splitlines()[-_LAST_LINES:]
        print(f"lockstep: rank {rank} ended first; its last lines ({log}):", *lines, sep="\n", file=sys.stderr)
    then = "goes back to the queue" if verdict.requeue else "is not requeued"
    print(f"lockstep: the job {then}: {verdict.why}", file=sys.stderr, flush=True)


def _newest_checkpoint(run: Path) -> str:
    """Return the name of the newest checkpoint, the empty text if there is none. It may be damaged: some did get written."""
    names = [path.name for path in RunFiles(run).checkpoints.glob("step-*")]
    return max((name for name in names if ".partial-" not in name and ".damaged-" not in name), default="")


def _records(history: Path) -> list[dict[str, Any]]:
    return [json_files.parse(line) for line in history.read_text().splitlines()] if history.exists() else []


def _is_cancelled(job: Mapping[str, str]) -> bool:
    """Tell from Slurm's words about a job whether it was cancelled, and not that its time was over.

    While its last processes end, a job that Slurm has ended for whatever reason is COMPLETING; one that ends by itself, or is
    preempted and has its grace time, is RUNNING to the last.
    """
    over = _seconds(job.get("RunTime", "")) >= _seconds(job.get("TimeLimit", "")) > 0
    return job.get("JobState") in ("CANCELLED", "COMPLETING") and not over


def _seconds(text: str) -> int:
    """Read ``[D-]HH:MM:SS``; 0 for anything else, such as UNLIMITED."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", text)
    if found is None:
        return 0
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def _asked(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))


if __name__ == "__main__":
    sys.exit(main())
