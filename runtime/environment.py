"""What a launch says to its processes in environment variables; and the list of all others that Lockstep reads or sets.

Read here:

LOCKSTEP_WORLD_SIZE     processes that ``lockstep train`` asked for
LOCKSTEP_LAUNCH         token of one launch, repeated in ``outcome.json``
LOCKSTEP_OUTCOME        file of the launcher in which each machine's first process leaves the outcome; runs leave theirs in the
                        run folder, too
LOCKSTEP_LAUNCHER       process id of ``lockstep train`` or the node launcher; when it ends, the ranks save and leave
LOCKSTEP_WATCH          ``off``: a rank that loses another raises an error and its process lives on; for tests
LOCKSTEP_DATA           folder in which data is looked for that is neither where its path says nor in an installed package
WORLD_SIZE, RANK, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT    set by ``accelerate launch`` and torchrun
OMPI_COMM_WORLD_*, PMI_*, MPI_LOCAL*, MV2_COMM_WORLD_*    the same, set by ``mpirun``
GLOO_SOCKET_IFNAME      the network interface that the user has chosen for gloo
ACCELERATE_USE_CPU      the user wants the CPU, whatever devices there are
TORCHELASTIC_RUN_ID, TORCHELASTIC_RESTART_COUNT    tell a restart by torchrun from another job
TORCHELASTIC_USE_AGENT_STORE    whether a launch agent hosts the process group's store

Read where they are used, since they belong to another library or to the user's shell:

ACCELERATE_*, FSDP_*    settings of ``accelerate launch``: ``config/launcher_table.py`` has the table of them
ACCELERATE_USE_DEEPSPEED, DS_ACCELERATOR, LOCAL_RANK    set for DeepSpeed while it starts: ``strategies/zero``
CUBLAS_WORKSPACE_CONFIG, NCCL_ALGO    set unless the user has: ``determinism.py``
SLURM_*                 which job and which step of it this is: ``launch/slurm/variables.py``
OMP_NUM_THREADS         threads of each process, set by the launcher unless the user has: ``launch``
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
_HOW = "Start it with: lockstep train CONFIG --processes N"


def rank() -> int:
    """This process's rank, before there is a process group."""
    return whole_number("RANK") or 0


def world_size() -> int:
    """Processes of the launch, as it says itself."""
    return whole_number("WORLD_SIZE") or 1


def local_rank() -> int:
    """This process's rank among those of its machine."""
    return whole_number("LOCAL_RANK") or 0


def local_world_size(world_size: int) -> int:
    """How many processes of a world run on this machine; all of them where the launcher does not say."""
    return whole_number("LOCAL_WORLD_SIZE") or world_size


def launch_token() -> str | None:
    """The token of the launch that started this process."""
    return os.environ.get("LOCKSTEP_LAUNCH")


def launcher() -> int | None:
    """The process id of the launcher of ours that started this process, or None."""
    return whole_number("LOCKSTEP_LAUNCHER")


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
    return os.environ.get("MASTER_ADDR", "127.0.0.1"), whole_number("MASTER_PORT") or 0


def wants_cpu() -> bool:
    """Tell whether the user wants the CPU, whatever devices there are."""
    return is_true(os.environ.get("ACCELERATE_USE_CPU", ""))


def has_chosen_interface() -> bool:
    """Tell whether the user has said which network interface gloo is to use."""
    return "GLOO_SOCKET_IFNAME" in os.environ


def on_one_machine() -> bool:
    """Tell whether all ranks are on this machine, as far as it can be told."""
    size = whole_number("WORLD_SIZE") or 1
    address = store_address()[0]
    return size == 1 or whole_number("LOCAL_WORLD_SIZE") == size or address == "localhost" or address.startswith("127.")


def agent_hosts_store() -> bool:
    """Tell whether a launch agent hosts the process group's store, rather than rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def start_token() -> str:
    """What tells one start of the ranks from a later one that uses the same store."""
    return f"{launch_token() or 'run'}-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def launch_agent() -> tuple[str, int] | None:
    """Return the id that torchrun was given for this job, and how often it has started the ranks again; None without an id."""
    job = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return (job, whole_number("TORCHELASTIC_RESTART_COUNT") or 0) if job != "none" else None  # the default


def whole_number(name: str) -> int | None:
    """Return a variable's whole number, None where there is none."""
    text = os.environ.get(name, "")
    return int(text) if _is_count(text) else None


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdigit()


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
        if value is not None and not _is_count(value):
            raise WorldSizeError(f"{name} is {value!r}, not a number")
    if asked is not None:
        return int(asked)
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
    """Name ranks as torch does where ``mpirun`` has started them, with or without ``accelerate launch`` before it.

    Raises:
        WorldSizeError: they are on several machines, and none is named as the one where they meet.
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
            f"mpirun has started {size} processes, and nothing says on which machine they meet: "
            "mpirun -x MASTER_ADDR=HOST -x MASTER_PORT=29500 …, with the machine of rank 0"
        )
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(local_rank or 0)}
    if local_size is not None:
        os.environ["LOCAL_WORLD_SIZE"] = str(local_size)


def check_launch() -> None:
    """Use what ``mpirun`` says of the ranks, and refuse what means nothing or is incomplete, whoever says it.

    Raises:
        WorldSizeError: naming the variable and its value.
    """
    take_over_mpi()
    said = {name: os.environ[name] for name in _COUNTS if name in os.environ}
    for name, text in said.items():
        if not _is_count(text):
            raise WorldSizeError(f"{name} is {text!r}, not a number. {_HOW}")
    ranks = [name for name in ("RANK", "LOCAL_RANK") if name in said]
    if "WORLD_SIZE" not in said:
        if ranks and "MASTER_ADDR" not in os.environ:
            raise WorldSizeError(f"{ranks[0]} is set, and WORLD_SIZE is not: how many processes are there? {_HOW}")
        return
    sizes = {name: int(text) for name, text in said.items()}
    for rank, size in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE"), ("LOCAL_RANK", "WORLD_SIZE")):
        if rank in sizes and size in sizes and sizes[rank] >= sizes[size]:
            raise WorldSizeError(f"{rank} is {sizes[rank]}, of {size}={sizes[size]} counted from 0. {_HOW}")
    if sizes["WORLD_SIZE"] < 1:
        raise WorldSizeError(f"WORLD_SIZE is {said['WORLD_SIZE']}: there must be one process at least. {_HOW}")
    if sizes["WORLD_SIZE"] == 1 and not ranks:
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        what = (
            f"WORLD_SIZE is {said['WORLD_SIZE']}, and {' and '.join(missing)} {'are' if missing[1:] else 'is'} not set"
        )
        raise WorldSizeError(f"{what}: the processes cannot find each other. {_HOW}")
    if not 0 < sizes["MASTER_PORT"] < 65536:
        raise WorldSizeError(f"MASTER_PORT is {said['MASTER_PORT']}, not a port: 1 to 65535")


def check_launched_world_size() -> None:
    """Refuse processes of which it can be told without torch that each would train alone, or that too few were started.

    Raises:
        WorldSizeError: naming both sizes.
    """
    check_launch()
    requested = requested_world_size(None)
    check_world_size(requested, int(os.environ.get("WORLD_SIZE", "1")))


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
            "Each process would train alone. On a machine without GPUs set ACCELERATE_USE_CPU=true for the processes of "
            f"accelerate launch --multi_gpu, torchrun, mpirun or deepspeed. {_HOW}"
        )
    else:
        message += f"Change strategy.world_size, or s{_HOW[1:]}"
    raise WorldSizeError(message)
