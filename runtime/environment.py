"""The environment variables that Lockstep reads, all of them here.

LOCKSTEP_WORLD_SIZE     processes that ``lockstep train`` asked for
LOCKSTEP_LAUNCH         token of one launch, repeated in ``outcome.json``
LOCKSTEP_OUTCOME        file of the launcher in which each machine's first process leaves the outcome; runs leave theirs in the
                        run folder, too
LOCKSTEP_WATCH          ``off``: a rank that loses another raises an error and its process lives on; for tests
LOCKSTEP_DATA           folder in which data is looked for that is neither where its path says nor in an installed package
WORLD_SIZE, LOCAL_WORLD_SIZE, RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT    set by ``accelerate launch`` and torchrun
GLOO_SOCKET_IFNAME      the network interface that the user has chosen for gloo
ACCELERATE_*, FSDP_*    settings of ``accelerate launch``: ``config/launcher_table.py`` has the table of them
SLURM_JOB_ID, SLURM_RESTART_COUNT    tell a restart of this job from another job
SLURM_STEP_NUM_NODES, SLURM_STEP_NUM_TASKS, SLURM_STEP_NODELIST, SLURM_NODEID    what srun has started, and which of it this is
TORCHELASTIC_RUN_ID, TORCHELASTIC_RESTART_COUNT    the same, where there is no Slurm
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import WorldSizeError

_HOW = "start it with: lockstep train CONFIG --processes N"


def rank() -> int:
    """This process's rank, before there is a process group."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """This process's rank among those of its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size(world_size: int) -> int:
    """How many processes of a world run on this machine; all of them where the launcher does not say."""
    told = os.environ.get("LOCAL_WORLD_SIZE", "")
    return int(told) if told.isdigit() else world_size


def launch_token() -> str | None:
    """The token of the launch that started this process."""
    return os.environ.get("LOCKSTEP_LAUNCH")


def outcome_file() -> Path | None:
    """The launcher's own file, in which the first process of each machine leaves the outcome."""
    path = os.environ.get("LOCKSTEP_OUTCOME")
    return Path(path) if path else None


def data_folder() -> Path | None:
    """The folder in which data is looked for last, or None."""
    folder = os.environ.get("LOCKSTEP_DATA")
    return Path(folder).expanduser() if folder else None


def is_watched() -> bool:
    """Tell whether ranks watch each other and leave when one is lost."""
    return os.environ.get("LOCKSTEP_WATCH") != "off"


def store_address() -> tuple[str, int]:
    """The address and port of the process group's store."""
    return os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT") or 0)


def has_chosen_interface() -> bool:
    """Tell whether the user has said which network interface gloo is to use."""
    return "GLOO_SOCKET_IFNAME" in os.environ


def start_token() -> str:
    """What tells one start of the ranks from a later one that uses the same store."""
    return f"{launch_token() or 'run'}-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def job_identity() -> tuple[str | None, int]:
    """Return the job's id, the same after a restart, and how often it was restarted."""
    if job := os.environ.get("SLURM_JOB_ID"):
        return job, int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    job = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    if job != "none":  # torchrun's default, the same for every run
        return job, int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0)
    return None, 0


@dataclass(frozen=True)
class SlurmStep:
    """What ``srun`` has started.

    Args:
        tasks: on all nodes.
        node_rank: of this task's node, counted from 0.
        node_list: as Slurm writes it: ``n[1-4]``.
        job: its id.
    """

    nodes: int
    tasks: int
    node_rank: int
    node_list: str
    job: int


def slurm_step() -> SlurmStep | None:
    """Return the step that this process is a task of, or None."""
    names = ("SLURM_STEP_NUM_NODES", "SLURM_STEP_NUM_TASKS", "SLURM_NODEID", "SLURM_STEP_NODELIST", "SLURM_JOB_ID")
    nodes, tasks, rank, node_list, job = (os.environ.get(name, "") for name in names)
    if not node_list or not all(value.isdigit() for value in (nodes, tasks, rank, job)):
        return None
    return SlurmStep(int(nodes), int(tasks), int(rank), node_list, int(job))


def requested_world_size(configured: int | None) -> int:
    """Return how many processes were asked for.

    Args:
        configured: ``strategy.world_size``.

    Raises:
        WorldSizeError: the launcher meant several processes and started single ones, each unaware of the others.
    """
    launched = os.environ.get("WORLD_SIZE")
    if launched is None and "MASTER_ADDR" in os.environ:
        raise WorldSizeError(
            "the launcher was asked for several processes but started them without WORLD_SIZE, so each would train alone. "
            "`accelerate launch` does this with --num_processes above 1 on a machine without GPUs, and with --cpu "
            f"--num_machines 2. {_HOW}"
        )
    asked = os.environ.get("LOCKSTEP_WORLD_SIZE")
    for name, value in (("LOCKSTEP_WORLD_SIZE", asked), ("WORLD_SIZE", launched)):
        if value is not None and not value.isdigit():
            raise WorldSizeError(f"{name} is {value!r}, not a number")
    if asked is not None:
        return int(asked)
    if configured is not None:
        return configured
    return int(launched) if launched is not None else 1


def check_launched_world_size() -> None:
    """Refuse processes of which it can be told without torch that each would train alone, or that too few were started.

    Raises:
        WorldSizeError: naming both sizes.
    """
    launched = os.environ.get("WORLD_SIZE", "1")
    check_world_size(requested_world_size(None), int(launched))


def check_world_size(requested: int, actual: int) -> None:
    """Refuse a process group of another size than was asked for.

    Raises:
        WorldSizeError: naming both sizes.
    """
    if actual == requested:
        return
    message = (
        f"{requested} process{'es were' if requested != 1 else ' was'} asked for, but the process group has {actual}. "
    )
    if actual == 1:
        message += (
            "Each process would train alone. On a machine without GPUs `accelerate launch --multi_gpu` needs "
            f"ACCELERATE_USE_CPU=true. {_HOW}"
        )
    else:
        message += f"Change strategy.world_size, or {_HOW}"
    raise WorldSizeError(message)
