"""Starting a run's processes on this machine, passing signals on, and turning its outcome into an exit code."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import runtime
from launch.accelerate_command import command, environment, shown
from launch.job import JobSpec
from launch.node_rendezvous import NodeInfo, meet
from runtime.config.file import LoadedConfiguration
from runtime.environment import wants_cpu
from runtime.outcome import read_outcome
from runtime.run_files import OUTCOME, RunFiles

_LAUNCHER = str(Path("accelerate", "commands", "launch.py"))


def num_gpus() -> int:
    """Return the number of GPUs torch can use, none if the user chose the CPU."""
    import torch

    if wants_cpu():
        return 0
    return torch.cuda.device_count()


def train_locally(
    loaded: LoadedConfiguration,
    config: Path,
    overrides: Sequence[str],
    *,
    processes: int,
    use_gpus: bool,
    place: NodeInfo | None = None,
    act: Literal["train", "doctor"] = "train",
) -> int:
    """Print and run the ``accelerate launch`` line; return 0 finished, 75 stopped, 2 configuration, 1 failure.

    Args:
        place: of this machine among several.
        act: what the processes do; ``doctor`` leaves the run folder alone.

    Raises:
        RendezvousError: the machines did not come together.
    """
    job = JobSpec(
        script=_script(act),
        config=config,
        overrides=overrides,
        nodes=place.nodes if place is not None else 1,
        processes_per_node=processes,
        use_gpus=use_gpus,
    )
    token = None
    if place is not None:
        place, token = meet(place, patience_seconds=loaded.values.limit.start_seconds)
    return _launched(job, RunFiles(loaded.output).outcome if act == "train" else None, place=place, token=token)


def infer_locally(act: str, source: Path, arguments: Sequence[str], *, processes: int, use_gpus: bool) -> int:
    """Like :func:`train_locally` for ``evaluate`` and ``predict``, whose outcome is not the run's.

    Args:
        source: YAML file or run folder.
        arguments: ``key.path=value``, and options.
    """
    job = JobSpec(
        script=_script(act), config=source, overrides=arguments, processes_per_node=processes, use_gpus=use_gpus
    )
    return _launched(job, None)


def _script(act: str) -> Path:
    return Path(runtime.__path__[0]) / f"{act}.py"


def _launched(
    job: JobSpec, run_outcome: Path | None, *, place: NodeInfo | None = None, token: str | None = None
) -> int:
    """Run a job and return its exit code.

    Args:
        run_outcome: where rank 0 leaves the run's outcome; that of this launch comes back in a file of its own as well.
    """
    threads = num_threads(job.processes_per_node)
    token = token or secrets.token_hex(8)
    where = (
        {"port": _free_port()}
        if place is None
        else {"port": place.port, "address": place.address, "node_rank": place.node_rank}
    )
    line = command(job, python=sys.executable, num_threads=threads, agent=Path(__file__).with_name("agent.py"), **where)
    with TemporaryDirectory(prefix="lockstep-") as folder:
        own_outcome = Path(folder) / OUTCOME
        added = environment(job, launch=token, num_threads=threads, outcome=own_outcome)
        print(shown(line, added), file=sys.stderr, flush=True)
        code = _run(line, {**os.environ, **added})
        outcome = (read_outcome(run_outcome, token) if run_outcome else None) or read_outcome(own_outcome, token)
    return int(outcome["exit_code"]) if outcome else (1 if code else 0)


def num_threads(processes: int) -> int:
    """Return what the user asks for, or a share of the cores: more threads than cores make a step several times slower."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // processes)


def _run(line: Sequence[str], variables: dict[str, str]) -> int:
    """Run the launcher in a process group of its own; a signal to us goes to all of it, once, and we wait for the end."""
    process = subprocess.Popen(
        line, env=variables, start_new_session=True, stderr=subprocess.PIPE, text=True, errors="replace", bufsize=1
    )
    assert process.stderr is not None
    pump = threading.Thread(target=_pass_on, args=(process.stderr,), daemon=True)
    pump.start()

    def signal_all(number: int, frame: object) -> None:
        _signal_group(process.pid, number)

    passed_on = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup has it
        passed_on.append(signal.SIGHUP)
    previous = {number: signal.signal(number, signal_all) for number in passed_on}
    try:
        code = process.wait()
        # A launcher of one process dies of the signal that its child saves after.
        while _signal_group(process.pid, 0):
            time.sleep(0.1)
        pump.join(timeout=2.0)  # a process that left the group may hold the pipe open
        return code
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _pass_on(stream: Iterable[str]) -> None:
    """Copy what the processes say to stderr, without the launcher's own traceback.

    ``accelerate launch`` ends with a traceback of itself whenever a process fails or is interrupted. It says nothing, and
    hides the one message that does. A traceback of the user's code passes.
    """
    block: list[str] = []
    rules = 0  # lines of "====" still to come in torchrun's own summary
    for line in stream:
        if rules:
            rules -= line.startswith("====")
            continue
        if line.startswith("Traceback (most recent call last):"):
            block = [line]
            continue
        if not block:
            sys.stderr.write(line)
            continue
        block.append(line)
        if line.strip() and not line[0].isspace():
            if not any(_LAUNCHER in entry for entry in block):
                sys.stderr.writelines(block)
            elif "ChildFailedError" in line:
                rules = 2
            block = []
    sys.stderr.writelines(block)


def _signal_group(group: int, number: int) -> bool:
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port
