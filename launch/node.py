"""Start the processes of one machine of several, without a launch agent: the command of a container.

    python -m launch.node CONFIG [key.path=value …] --nodes 4 --node-rank 0 --processes 8 --main-address HOST

The agent of ``accelerate launch`` kills its workers 30 s after SIGTERM, whatever they are writing, and turns every exit code
into 1. Here signals reach the processes, and the exit code is the run's outcome, the same on every machine: 0 finished, 75
stopped and can be resumed, 2 a mistake in the configuration or another failure that would repeat, 1 a failure that a restart
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
from launch.node_rendezvous import NodeInfo, rendezvous
from runtime.arguments import parsed
from runtime.config.file import load
from runtime.errors import LockstepError, WorldSizeError
from runtime.guarded import guarded
from runtime.outcome import read_outcome
from runtime.run_files import OUTCOME

_REQUESTS = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP}
_WATCHED = _REQUESTS | {signal.SIGCHLD}
_POLL_SECONDS = 1.0
_MARGIN_SECONDS = 10.0  # for the other ranks to report which one was lost


def main(arguments: Sequence[str] | None = None) -> int:
    """Start this machine's processes and wait for them; return the exit code (see the module docstring)."""
    options = parsed(_parser(), arguments)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # nohup
        _REQUESTS.discard(signal.SIGHUP)
        _WATCHED.discard(signal.SIGHUP)
    for number in _REQUESTS:  # until the processes start, there is nothing to save
        signal.signal(number, lambda number, frame: sys.exit(75))
    try:
        limit = load(options.config, options.overrides).values.limit
        _check(options)
        token = secrets.token_hex(8)
        if options.nodes > 1:  # one token for all: no machine joins a start that failed elsewhere
            place = NodeInfo(
                options.nodes, options.node_rank, options.main_address, options.main_port, options.processes
            )
            joined, token = rendezvous(place, timeout_seconds=limit.start_seconds)
            options.main_address = joined.address
        train_arguments = [str(options.config), *options.overrides]
        return _run(train_arguments, options, token=token, patience_seconds=limit.silence_seconds)
    except LockstepError as error:
        print(f"lockstep: {error}", file=sys.stderr)
        return error.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m launch.node", description="Train as one machine of several.")
    parser.add_argument("config", metavar="CONFIG", type=Path)
    parser.add_argument("overrides", metavar="key.path=value", nargs="*")
    parser.add_argument("--nodes", type=int, default=1, help="machines (default: 1)")
    parser.add_argument("--node-rank", type=int, default=0, help="rank of this machine, from 0")
    parser.add_argument("--processes", type=int, default=1, help="processes on each machine (default: 1)")
    parser.add_argument("--gpus", action="store_true", help="each process has a GPU")
    parser.add_argument("--main-address", metavar="HOST", default="127.0.0.1", help="name or address of machine 0")
    parser.add_argument("--main-port", metavar="PORT", type=int, default=29500)
    return parser


def exit_code(outcome: Mapping[str, Any] | None, codes: Sequence[int]) -> int:
    """Return this machine's exit code, from the outcome or else from the processes.

    Args:
        outcome: outcome written by the first process of this machine; None if there is none.
        codes: exit codes of all processes; negative ones are signals.
    """
    if outcome is None:
        return 2 if 2 in codes else 1
    code = int(outcome["exit_code"])
    return 2 if code == 1 and outcome.get("repeats") else code


def _check(options: argparse.Namespace) -> None:
    if not 0 <= options.node_rank < options.nodes:
        raise WorldSizeError(
            f"--node-rank is {options.node_rank}; with {options.nodes} machines it must be 0 to {options.nodes - 1}"
        )
    if options.gpus and (available := num_gpus()) < options.processes:
        # Not a configuration error: perhaps the driver is not up. Processes without a GPU would train on the CPU.
        raise LockstepError(f"{options.processes} GPUs were requested, but torch can use {available} on this machine")


def _run(arguments: Sequence[str], options: argparse.Namespace, *, token: str, patience_seconds: float) -> int:
    signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)  # received by sigtimedwait, one by one
    with TemporaryDirectory(prefix="lockstep-") as folder:
        outcome_file = Path(folder) / OUTCOME
        processes = [
            subprocess.Popen(
                [sys.executable, str(Path(runtime.__path__[0]) / "train.py"), *arguments],
                env={**os.environ, **_environment(options, local_rank, token), "LOCKSTEP_OUTCOME": str(outcome_file)},
                preexec_fn=_unblock_signals,  # noqa: PLW1509 - it only sets signals, which takes no lock
            )
            for local_rank in range(options.processes)
        ]
        codes = _wait(processes, patience_seconds + _MARGIN_SECONDS)
        return exit_code(read_outcome(outcome_file, token), codes)


def _environment(options: argparse.Namespace, local_rank: int, token: str) -> dict[str, str]:
    world_size = options.nodes * options.processes
    added = {
        "LOCKSTEP_WORLD_SIZE": str(world_size),  # the runtime refuses any other world size
        "LOCKSTEP_LAUNCH": token,
        "LOCKSTEP_LAUNCHER": str(os.getpid()),  # the ranks exit when this process ends
        "OMP_NUM_THREADS": str(num_threads(options.processes)),
    }
    if not options.gpus:
        added["ACCELERATE_USE_CPU"] = "true"  # without it, processes on CPUs form no group
    if world_size > 1:
        added |= {  # not set for a single process: Accelerate would wait for others
            "LOCAL_RANK": str(local_rank),
            "RANK": str(options.node_rank * options.processes + local_rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(options.processes),
            "MASTER_ADDR": options.main_address,
            "MASTER_PORT": str(options.main_port),
        }
    return added


def _unblock_signals() -> None:
    """Unblock signals but ignore them until the process installs handlers: runs in the child, before Python starts."""
    for number in _REQUESTS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _WATCHED)


def _wait(processes: Sequence[subprocess.Popen[bytes]], patience_seconds: float) -> list[int]:
    """Wait for all processes, forwarding signals; return their exit codes.

    Args:
        patience_seconds: time for the others to exit once one has failed; they are killed after it. They exit by themselves
            unless they never formed a group.
    """
    stopping, deadline = False, float("inf")
    while running := [process for process in processes if process.poll() is None]:
        if any(process.returncode for process in processes):
            deadline = min(deadline, time.monotonic() + patience_seconds)
        if stopping:  # repeatedly: a process that is still starting ignores it
            for process in running:
                process.send_signal(signal.SIGTERM)
        if time.monotonic() > deadline:
            for process in running:
                process.kill()
        received = signal.sigtimedwait(_WATCHED, _POLL_SECONDS)
        stopping |= received is not None and received.si_signo in _REQUESTS
    return [process.returncode for process in processes]


if __name__ == "__main__":
    sys.exit(guarded(main))
