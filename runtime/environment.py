"""The environment variables that Lockstep reads, all of them here.

LOCKSTEP_WORLD_SIZE     processes that ``lockstep train`` asked for
LOCKSTEP_LAUNCH         token of one launch, repeated in ``outcome.json``
LOCKSTEP_OUTCOME        file in which evaluate.py and predict.py leave their outcome; runs leave theirs in the run folder
LOCKSTEP_WATCH          ``off``: a rank that loses another raises an error and its process lives on; for tests
LOCKSTEP_DATA           folder in which data is looked for that is neither where its path says nor in an installed package
WORLD_SIZE, RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT    set by ``accelerate launch`` and torchrun
ACCELERATE_USE_FSDP     set by ``accelerate launch --use_fsdp``
SLURM_JOB_ID, SLURM_RESTART_COUNT    tell a restart of this job from another job
TORCHELASTIC_RUN_ID, TORCHELASTIC_RESTART_COUNT    the same, where there is no Slurm
"""

from __future__ import annotations

import os
from pathlib import Path

from runtime.errors import WorldSizeError

_HOW = "start it with: lockstep train CONFIG --processes N"


def rank() -> int:
    """This process's rank, before there is a process group."""
    return int(os.environ.get("RANK", "0"))


def launch_token() -> str | None:
    """The token of the launch that started this process."""
    return os.environ.get("LOCKSTEP_LAUNCH")


def outcome_file() -> Path | None:
    """The file in which an evaluation or a prediction leaves its outcome."""
    path = os.environ.get("LOCKSTEP_OUTCOME")
    return Path(path) if path else None


def data_folder() -> Path | None:
    """The folder in which data is looked for last, or None."""
    folder = os.environ.get("LOCKSTEP_DATA")
    return Path(folder).expanduser() if folder else None


def is_watched() -> bool:
    """Tell whether ranks watch each other and leave when one is lost."""
    return os.environ.get("LOCKSTEP_WATCH") != "off"


def launched_for_sharding() -> bool:
    """Tell whether the launcher was told to let Accelerate shard the model."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true", "yes")


def store_address() -> tuple[str, int]:
    """The address and port of the process group's store."""
    return os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT") or 0)


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
