"""Environment variables that a launcher sets for its processes, and a list of all others that Lockstep reads or sets.

Read here:

LOCKSTEP_WORLD_SIZE     number of processes requested by ``lockstep train``
LOCKSTEP_LAUNCH         token of one launch, repeated in ``outcome.json``
LOCKSTEP_OUTCOME        the launcher's file to which local rank 0 of each node writes the outcome; runs also write theirs to the
                        run folder
LOCKSTEP_LAUNCHER       process id of ``lockstep train`` or the node launcher; when it ends, the ranks save and exit
LOCKSTEP_WATCH          ``off``: a rank that loses another raises an error and its process stays alive; for tests
LOCKSTEP_DATA           fallback folder for data found neither at its path nor in an installed package
WORLD_SIZE, RANK, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT    set by ``accelerate launch`` and torchrun
OMPI_COMM_WORLD_*, PMI_*, MPI_LOCAL*, MV2_COMM_WORLD_*    the same, set by ``mpirun``
GLOO_SOCKET_IFNAME      network interface chosen by the user for gloo
ACCELERATE_USE_CPU      run on the CPU even if there are GPUs
TORCHELASTIC_RUN_ID, TORCHELASTIC_RESTART_COUNT    distinguish a restart by torchrun from another job
TORCHELASTIC_USE_AGENT_STORE    whether a launch agent hosts the process group's store

Read where they are used, since they belong to another library or to the user's shell:

ACCELERATE_*, FSDP_*    settings of ``accelerate launch``: table in ``config/launcher_table.py``
ACCELERATE_USE_DEEPSPEED, DS_ACCELERATOR, LOCAL_RANK    set for DeepSpeed while it starts: ``strategies/zero``
CUBLAS_WORKSPACE_CONFIG, NCCL_ALGO    set unless the user has: ``determinism.py``
SLURM_*                 job and job step: ``launch/slurm/variables.py``
OMP_NUM_THREADS         threads per process, set by the launcher unless the user has: ``launch``
WANDB_MODE, WANDB_API_KEY, WANDB_BASE_URL, WANDB_INIT_TIMEOUT, NETRC    of Weights & Biases: ``reporting/wandb_tracker.py``
XDG_CACHE_HOME          folder of cached token files: ``data_sources/source_code.py``
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from runtime.config.launcher_table import is_true
from runtime.errors import WorldSizeError

_COUNTS = ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "LOCKSTEP_WORLD_SIZE")
_MPI = (
    ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK"),
    ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "MV2_COMM_WORLD_LOCAL_SIZE"),
    ("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "MV2_COMM_WORLD_LOCAL_RANK"),
)
_HINT = "Start it with: lockstep train CONFIG --processes N"


def rank() -> int:
    """Return this process's rank, before there is a process group."""
    return whole_number("RANK") or 0


def world_size() -> int:
    """Return the world size set by the launcher, 1 if unset."""
    return whole_number("WORLD_SIZE") or 1


def local_rank() -> int:
    """Return this process's rank on its node."""
    return whole_number("LOCAL_RANK") or 0


def local_world_size(world_size: int) -> int:
    """Return the number of processes on this node: all of them if the launcher did not set it."""
    return whole_number("LOCAL_WORLD_SIZE") or world_size


def launch_token() -> str | None:
    """Return the token of the launch that started this process."""
    return os.environ.get("LOCKSTEP_LAUNCH")


def launcher() -> int | None:
    """Return the process id of the Lockstep launcher that started this process, or None."""
    return whole_number("LOCKSTEP_LAUNCHER")


def outcome_file() -> Path | None:
    """Return the launcher's file to which local rank 0 of each node writes the outcome, or None."""
    path = os.environ.get("LOCKSTEP_OUTCOME")
    return Path(path) if path else None


def data_folder() -> Path | None:
    """Return the fallback folder for data, or None."""
    folder = os.environ.get("LOCKSTEP_DATA")
    return Path(folder).expanduser() if folder else None


def is_watched() -> bool:
    """Return whether ranks watch each other and exit when one is lost."""
    return os.environ.get("LOCKSTEP_WATCH") != "off"


def store_address() -> tuple[str, int]:
    """Return the address and port of the process group's store."""
    return os.environ.get("MASTER_ADDR", "127.0.0.1"), whole_number("MASTER_PORT") or 0


def wants_cpu() -> bool:
    """Return whether the user asked to run on the CPU even if there are GPUs."""
    return is_true(os.environ.get("ACCELERATE_USE_CPU", ""))


def has_chosen_interface() -> bool:
    """Return whether the user has chosen gloo's network interface."""
    return "GLOO_SOCKET_IFNAME" in os.environ


def on_one_machine() -> bool:
    """Return whether all ranks are known to be on this machine."""
    size = whole_number("WORLD_SIZE") or 1
    address = store_address()[0]
    return size == 1 or whole_number("LOCAL_WORLD_SIZE") == size or address == "localhost" or address.startswith("127.")


def agent_hosts_store() -> bool:
    """Return whether a launch agent hosts the process group's store, rather than rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def start_token() -> str:
    """Return a token that distinguishes this start of the ranks from later ones that use the same store."""
    return f"{launch_token() or 'run'}-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def launch_agent() -> tuple[str, int] | None:
    """Return torchrun's job id and its restart count; None if no id was set."""
    job = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return (job, whole_number("TORCHELASTIC_RESTART_COUNT") or 0) if job != "none" else None  # the default


def whole_number(name: str) -> int | None:
    """Return a variable as a non-negative integer; None if it is unset or not one."""
    text = os.environ.get(name, "")
    return int(text) if _is_count(text) else None


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdigit()


def requested_world_size(configured: int | None) -> int:
    """Return the requested number of processes.

    Args:
        configured: ``strategy.world_size``.

    Raises:
        WorldSizeError: the launcher was asked for several processes but started independent single ones.
    """
    launched = os.environ.get("WORLD_SIZE")
    if launched is None and "MASTER_ADDR" in os.environ:
        raise WorldSizeError(
            "the launcher was asked for several processes but started them without WORLD_SIZE, so each would train alone. "
            "`accelerate launch` does this with --num_processes above 1 on a machine without GPUs, and with --cpu "
            f"--num_machines 2. {_HINT}"
        )
    requested = os.environ.get("LOCKSTEP_WORLD_SIZE")
    for name, value in (("LOCKSTEP_WORLD_SIZE", requested), ("WORLD_SIZE", launched)):
        if value is not None and not _is_count(value):
            raise WorldSizeError(f"{name} is {value!r}, not a number")
    if requested is not None:
        return int(requested)
    if configured is not None:
        return configured
    return int(launched) if launched is not None else 1


@contextmanager
def launch_variables_kept() -> Iterator[None]:
    """Put ranks and sizes back as the launcher set them.

    Accelerate writes what it takes them to be, and takes a missing LOCAL_WORLD_SIZE for 1 (1.15).
    """
    before = {name: os.environ.get(name) for name in _COUNTS}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def take_over_mpi() -> None:
    """Set torch's rank variables from those of ``mpirun``, with or without ``accelerate launch`` before it.

    Raises:
        WorldSizeError: the ranks are on several machines, and MASTER_ADDR is not set.
    """
    if any(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCKSTEP_WORLD_SIZE")):
        return
    size, rank, local_size, local_rank = (
        next((value for name in names if (value := whole_number(name)) is not None), None) for names in _MPI
    )
    if size is None or rank is None or size < 2:
        return
    if "MASTER_ADDR" not in os.environ and local_size != size:
        raise WorldSizeError(
            f"mpirun started {size} processes without MASTER_ADDR, and not all of them are known to be on one machine; start "
            "them with mpirun -x MASTER_ADDR=HOST -x MASTER_PORT=29500 …, where HOST is the machine of rank 0"
        )
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(local_rank or 0)}
    if local_size is not None:
        os.environ["LOCAL_WORLD_SIZE"] = str(local_size)


def check_launch() -> None:
    """Apply ``mpirun``'s rank variables, and refuse invalid or incomplete launch variables.

    Raises:
        WorldSizeError: naming the variable and its value.
    """
    take_over_mpi()
    variables = {name: os.environ[name] for name in _COUNTS if name in os.environ}
    for name, text in variables.items():
        if not _is_count(text):
            raise WorldSizeError(f"{name} is {text!r}, not a number. {_HINT}")
    ranks = [name for name in ("RANK", "LOCAL_RANK") if name in variables]
    if "WORLD_SIZE" not in variables:
        if ranks and "MASTER_ADDR" not in os.environ:
            raise WorldSizeError(f"{ranks[0]} is set, but WORLD_SIZE is not. {_HINT}")
        return
    sizes = {name: int(text) for name, text in variables.items()}
    for rank, size in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE"), ("LOCAL_RANK", "WORLD_SIZE")):
        if rank in sizes and size in sizes and sizes[rank] >= sizes[size]:
            raise WorldSizeError(f"{rank} is {sizes[rank]}, but must be less than {size}={sizes[size]}. {_HINT}")
    if sizes["WORLD_SIZE"] < 1:
        raise WorldSizeError(f"WORLD_SIZE is {variables['WORLD_SIZE']}: there must be at least one process. {_HINT}")
    if sizes["WORLD_SIZE"] == 1 and not ranks:
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        unset = f"{' and '.join(missing)} {'are' if missing[1:] else 'is'} not set"
        raise WorldSizeError(
            f"WORLD_SIZE is {variables['WORLD_SIZE']}, but {unset}: the processes cannot find each other. {_HINT}"
        )
    if not 0 < sizes["MASTER_PORT"] < 65536:
        raise WorldSizeError(f"MASTER_PORT is {variables['MASTER_PORT']}, not a port: 1 to 65535")


def check_launched_world_size() -> None:
    """Refuse, without importing torch, processes that would each train alone or that are too few.

    Raises:
        WorldSizeError: naming both sizes.
    """
    check_launch()
    requested = requested_world_size(None)
    check_world_size(requested, int(os.environ.get("WORLD_SIZE", "1")))


def check_world_size(requested: int, actual: int) -> None:
    """Refuse a process group whose size differs from the requested one.

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
            "Each process would train alone. On a machine without GPUs set ACCELERATE_USE_CPU=true for the processes of "
            f"accelerate launch --multi_gpu, torchrun, mpirun or deepspeed. {_HINT}"
        )
    else:
        message += f"Change strategy.world_size, or s{_HINT[1:]}"
    raise WorldSizeError(message)
