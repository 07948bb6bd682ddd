"""The ``accelerate launch`` line for one machine, which may be one of several.

On CPUs the obvious lines are silently wrong: ``--cpu --num_processes 2`` starts one process, and ``--multi_gpu`` starts two
that do not form a group unless ``ACCELERATE_USE_CPU`` is set. So every value is passed explicitly, none is left to defaults
or to the user's ``accelerate config``.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from launch.job import JobSpec

_HIDDEN = ("LOCKSTEP_LAUNCH", "LOCKSTEP_LAUNCHER", "LOCKSTEP_OUTCOME")  # belong to one launch: left out when printed


def command(
    job: JobSpec,
    *,
    python: str,
    port: int,
    num_threads: int,
    address: str = "127.0.0.1",
    node_rank: int = 0,
    agent: Path | None = None,
) -> list[str]:
    """Return the command that starts a job on this machine.

    Args:
        python: the interpreter.
        port: free port on the first machine, for the rendezvous.
        num_threads: threads per process.
        address: address of the first machine.
        node_rank: rank of this machine.
        agent: script that runs the launcher (``launch/agent.py``). Default: run it directly.
    """
    several = job.processes > 1
    return [
        python, *([str(agent)] if agent is not None else []), "-m", "accelerate.commands.launch",
        "--config_file", str(files("launch") / "templates" / "accelerate.yaml"),
        *(["--multi_gpu"] if several else [] if job.use_gpus else ["--cpu"]),
        "--num_processes", str(job.processes),
        "--num_machines", str(job.nodes),
        "--machine_rank", str(node_rank),
        *(["--main_process_ip", address, "--main_process_port", str(port)] if several else []),
        "--mixed_precision", "no",
        "--dynamo_backend", "no",
        "--num_cpu_threads_per_process", str(num_threads),
        str(job.script), str(job.config), *job.overrides,
    ]  # fmt: skip


def environment(job: JobSpec, *, launch: str, num_threads: int, outcome: Path | None = None) -> dict[str, str]:
    """Return the variables to add to the job's environment.

    Args:
        launch: token of this launch, which the outcome repeats.
        num_threads: threads per process.
        outcome: file for the outcome. Default: the one in the run folder.
    """
    added = {
        "LOCKSTEP_WORLD_SIZE": str(job.processes),  # the runtime refuses any other world size
        "LOCKSTEP_LAUNCH": launch,
        "LOCKSTEP_LAUNCHER": str(os.getpid()),  # the ranks exit when this process ends
        "OMP_NUM_THREADS": str(num_threads),
    }
    if not job.use_gpus:
        added["ACCELERATE_USE_CPU"] = "true"
    if outcome is not None:
        added["LOCKSTEP_OUTCOME"] = str(outcome)
    return added


def shell_line(command: Sequence[str], environment: dict[str, str]) -> str:
    """Return a command and its variables as one line for a shell."""
    visible = {key: value for key, value in environment.items() if key not in _HIDDEN}
    return shlex.join([*(f"{key}={value}" for key, value in visible.items()), *command])
