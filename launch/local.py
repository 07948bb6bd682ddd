"""Start a run's processes on this machine, forward signals to them, and turn the outcome into an exit code."""

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
from launch.accelerate_command import command, environment, shell_line
from launch.job import JobSpec
from launch.node_rendezvous import NodeInfo, rendezvous
from runtime.config.file import LoadedConfiguration
from runtime.environment import wants_cpu
from runtime.outcome import read_outcome
from runtime.run_files import OUTCOME, RunFiles

_LAUNCHER = str(Path("accelerate", "commands", "launch.py"))


def num_gpus() -> int:
    """Return the number of GPUs torch can use; 0 if the user chose the CPU."""
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
    entry_point: Literal["train", "doctor"] = "train",
) -> int:
    """Print and run the ``accelerate launch`` line; return 0 finished, 75 stopped, 2 configuration, 1 failure.

    Args:
        place: this machine's place among several.
        entry_point: what the processes run; ``doctor`` does not write to the run folder.

    Raises:
        RendezvousError: not all machines came, or their options differ.
    """
    job = JobSpec(
        script=_script(entry_point),
        config=config,
        overrides=overrides,
        nodes=place.nodes if place is not None else 1,
        processes_per_node=processes,
        use_gpus=use_gpus,
    )
    token = None
    if place is not None:
        place, token = rendezvous(place, timeout_seconds=loaded.values.limit.start_seconds)
    return _launch(job, RunFiles(loaded.output).outcome if entry_point == "train" else None, place=place, token=token)


def infer_locally(entry_point: str, source: Path, arguments: Sequence[str], *, processes: int, use_gpus: bool) -> int:
    """Like :func:`train_locally`, for ``evaluate`` and ``predict``, which do not write the run's outcome.

    Args:
        source: YAML file or run folder.
        arguments: ``key.path=value``, and options.
    """
    job = JobSpec(
        script=_script(entry_point), config=source, overrides=arguments, processes_per_node=processes, use_gpus=use_gpus
    )
    return _launch(job, None)


def _script(entry_point: str) -> Path:
    return Path(runtime.__path__[0]) / f"{entry_point}.py"


def _launch(job: JobSpec, run_outcome: Path | None, *, place: NodeInfo | None = None, token: str | None = None) -> int:
    """Run a job and return its exit code.

    Args:
        run_outcome: file that rank 0 writes the run's outcome to. This launch also gets its own temporary outcome file.
    """
    threads = num_threads(job.processes_per_node)
    token = token or secrets.token_hex(8)
    main_host = (
        {"port": _free_port()}
        if place is None
        else {"port": place.port, "address": place.address, "node_rank": place.node_rank}
    )
    line = command(
        job, python=sys.executable, num_threads=threads, agent=Path(__file__).with_name("agent.py"), **main_host
    )
    with TemporaryDirectory(prefix="lockstep-") as folder:
        launch_outcome = Path(folder) / OUTCOME
        added = environment(job, launch=token, num_threads=threads, outcome=launch_outcome)
        print(shell_line(line, added), file=sys.stderr, flush=True)
        code = _run(line, {**os.environ, **added})
        outcome = (read_outcome(run_outcome, token) if run_outcome else None) or read_outcome(launch_outcome, token)
    return int(outcome["exit_code"]) if outcome else (1 if code else 0)


def num_threads(processes: int) -> int:
    """Return ``OMP_NUM_THREADS``, or an equal share of the cores: more threads than cores make a step several times slower."""
    requested = os.environ.get("OMP_NUM_THREADS", "")
    if requested.isdigit() and int(requested) > 0:
        return int(requested)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // processes)


def _run(line: Sequence[str], variables: dict[str, str]) -> int:
    """Run the launcher in a new process group, forward signals to the whole group once, and wait for its end."""
    process = subprocess.Popen(
        line, env=variables, start_new_session=True, stderr=subprocess.PIPE, text=True, errors="replace", bufsize=1
    )
    assert process.stderr is not None
    pump = threading.Thread(target=_copy_stderr, args=(process.stderr,), daemon=True)
    pump.start()

    def signal_all(number: int, frame: object) -> None:
        _signal_group(process.pid, number)

    forwarded = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # ignored under nohup
        forwarded.append(signal.SIGHUP)
    previous = {number: signal.signal(number, signal_all) for number in forwarded}
    try:
        code = process.wait()
        # The launcher of one process is killed by the signal, while its child is still saving.
        while _signal_group(process.pid, 0):
            time.sleep(0.1)
        pump.join(timeout=2.0)  # a process that left the group may keep the pipe open
        return code
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _copy_stderr(stream: Iterable[str]) -> None:
    """Copy the stderr of the processes, without the traceback of the launcher.

    ``accelerate launch`` ends with its own traceback whenever a process fails or is interrupted, which hides the error
    message. Tracebacks of user code are kept.
    """
    block: list[str] = []
    rules = 0  # remaining "====" lines of torchrun's summary
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
