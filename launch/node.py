"""The processes of one machine of several, without a launch agent: what a container runs.

    python -m launch.node CONFIG [key.path=value …] --nodes 4 --node-rank 0 --processes 8 --main-address HOST

``accelerate launch`` has an agent between: it kills its workers 30 s after SIGTERM, whatever they are writing, and makes 1
of every exit code. Here signals arrive, and the exit code is the run's outcome, the same on every machine: 0 finished, 75
stopped and to be continued, 2 a mistake in the configuration or another failure that would repeat, 1 a failure that a new start
may get past.
"""

from __future__ import annotations

import argparse
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import runtime
from launch.local import num_gpus, num_threads
from launch.node_rendezvous import NodeInfo, meet
from runtime.arguments import parsed
from runtime.config.file import load
from runtime.errors import LockstepError, WorldSizeError
from runtime.guarded import guarded
from runtime.outcome import read_outcome
from runtime.run_files import OUTCOME

_REQUESTS = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP}
_WATCHED = _REQUESTS | {signal.SIGCHLD}
_POLL_SECONDS = 1.0
_MARGIN_SECONDS = 10.0  # for the others to tell which rank was lost, once they know


def main(given: Sequence[str] | None = None) -> int:
    """Start this machine's processes and wait for them; return the exit code that the module's docstring lists."""
    options = parsed(_parser(), given)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # nohup
        _REQUESTS.discard(signal.SIGHUP)
        _WATCHED.discard(signal.SIGHUP)
    for number in _REQUESTS:  # until there is something to save
        signal.signal(number, lambda number, frame: sys.exit(75))
    try:
        limit = load(options.config, options.overrides).values.limit
        _check(options)
        token = secrets.token_hex(8)
        if options.nodes > 1:  # all get the same: none joins a start that has failed elsewhere
            place = NodeInfo(
                options.nodes, options.node_rank, options.main_address, options.main_port, options.processes
            )
            met, token = meet(place, patience_seconds=limit.start_seconds)
            options.main_address = met.address
        arguments = [str(options.config), *options.overrides]
        return _run(arguments, options, token=token, patience_seconds=limit.silence_seconds)
    except LockstepError as error:
        print(f"lockstep: {error}", file=sys.stderr)
        return error.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m launch.node", description="Train as one machine of several.")
    parser.add_argument("config", metavar="CONFIG", type=Path)
    parser.add_argument("overrides", metavar="key.path=value", nargs="*")
    parser.add_argument("--nodes", type=int, default=1, help="machines (default: 1)")
    parser.add_argument("--node-rank", type=int, default=0, help="which of them this is, from 0")
    parser.add_argument("--processes", type=int, default=1, help="on each machine (default: 1)")
    parser.add_argument("--gpus", action="store_true", help="each process has a GPU")
    parser.add_argument("--main-address", metavar="HOST", default="127.0.0.1", help="machine 0")
    parser.add_argument("--main-port", metavar="PORT", type=int, default=29500)
    return parser


def exit_code(outcome: Mapping[str, Any] | None, codes: Sequence[int]) -> int:
    """Return the code that says what is to follow.

    Args:
        outcome: what the first process of this machine has left; None if nothing.
        codes: of all processes; negative ones are signals.
    """
    if outcome is None:
        return 2 if 2 in codes else 1
    code = int(outcome["exit_code"])
    return 2 if code == 1 and outcome.get("repeats") else code


def _check(options: argparse.Namespace) -> None:
    if not 0 <= options.node_rank < options.nodes:
        raise WorldSizeError(f"--node-rank is {options.node_rank}, of {options.nodes} machines counted from 0")
    if options.gpus and (found := num_gpus()) < options.processes:
        # Not a mistake in the configuration: a driver that is not up, say. Processes without one would train on the CPU.
        raise LockstepError(f"{options.processes} GPUs were asked for, and torch can use {found} on this machine")


def _run(arguments: Sequence[str], options: argparse.Namespace, *, token: str, patience_seconds: float) -> int:
    signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)  # waited for, one by one
    with TemporaryDirectory(prefix="lockstep-") as folder:
        outcome_file = Path(folder) / OUTCOME
        processes = [
            subprocess.Popen(
                [sys.executable, str(Path(runtime.__path__[0]) / "train.py"), *arguments],
                env={**os.environ, **_environment(options, local_rank, token), "LOCKSTEP_OUTCOME": str(outcome_file)},
                preexec_fn=_let_signals_in,  # noqa: PLW1509 - it only sets signals, which takes no lock
            )
            for local_rank in range(options.processes)
        ]
        codes = _wait(processes, patience_seconds + _MARGIN_SECONDS)
        return exit_code(read_outcome(outcome_file, token), codes)


def _environment(options: argparse.Namespace, local_rank: int, token: str) -> dict[str, str]:
    world_size = options.nodes * options.processes
    added = {
        "LOCKSTEP_WORLD_SIZE": str(world_size),  # the runtime refuses any other
        "LOCKSTEP_LAUNCH": token,
        "LOCKSTEP_LAUNCHER": str(os.getpid()),  # they leave when this process ends
        "OMP_NUM_THREADS": str(num_threads(options.processes)),
    }
    if not options.gpus:
        added["ACCELERATE_USE_CPU"] = "true"  # without it, processes on CPUs know nothing of each other
    if world_size > 1:
        added |= {  # one process alone gets none of these: Accelerate would look for the others
            "LOCAL_RANK": str(local_rank),
            "RANK": str(options.node_rank * options.processes + local_rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(options.processes),
            "MASTER_ADDR": options.main_address,
            "MASTER_PORT": str(options.main_port),
        }
    return added


def _let_signals_in() -> None:
    """Ignore signals until the process has handlers of its own, and then get them: runs in the child, before Python starts."""
    for number in _REQUESTS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _WATCHED)


def _wait(processes: Sequence[subprocess.Popen[bytes]], patience_seconds: float) -> list[int]:
    """Wait for all, passing signals on; return their exit codes.

    Args:
        patience_seconds: for the others, once one has left in failure: they leave by themselves, unless they never met.
    """
    asked, deadline = False, float("inf")
    while running := [process for process in processes if process.poll() is None]:
        if any(process.returncode for process in processes):
            deadline = min(deadline, time.monotonic() + patience_seconds)
        if asked:  # again and again: a process that is only starting still ignores it
            for process in running:
                process.send_signal(signal.SIGTERM)
        if time.monotonic() > deadline:
            for process in running:
                process.kill()
        noticed = signal.sigtimedwait(_WATCHED, _POLL_SECONDS)
        asked |= noticed is not None and noticed.si_signo in _REQUESTS
    return [process.returncode for process in processes]


if __name__ == "__main__":
    sys.exit(guarded(main))
