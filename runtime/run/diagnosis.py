"""``lockstep doctor``: what each rank finds where it runs, compared with what the others find, and the network between them."""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from runtime.config.file import LoadedConfiguration
from runtime.distributed.collectives import gather_bytes
from runtime.distributed.rank_consistency import code_digest
from runtime.errors import RanksDifferError
from runtime.reporting.facts import installed_version
from runtime.strategies import Strategy
from runtime.wording import in_units

_ALIKE = ("python", "torch", "accelerate", "lockstep", "device", "code")
_LEAST_DISK_BYTES = 1 << 30
_LEAST_SHARED_BYTES = 256 << 20  # docker gives 64 MiB, on which loader workers die of SIGBUS
_PROBE = ".lockstep-doctor"
_LARGE_BYTES = 16 << 20
_VISIBLE_SECONDS = 10.0  # a file server may take its time to show another machine's file


@dataclass(frozen=True)
class RankReport:
    """What one rank finds.

    Args:
        code: digest of the Python files of the run's code folder.
        disk_bytes: free where the run folder is, or would be; ``shared_bytes``: free shared memory, None if there is none.
        sees_folder: whether it sees what rank 0 wrote there.
    """

    rank: int
    host: str
    python: str
    torch: str
    accelerate: str
    lockstep: str
    device: str
    code: str
    cores: int
    disk_bytes: int
    shared_bytes: int | None
    sees_folder: bool


@dataclass(frozen=True)
class NetworkSpeed:
    """An all-reduce over all ranks.

    Args:
        latency_seconds: of one number, the median.
        bytes_per_second: of 16 MiB, what one rank hands over in a second.
    """

    latency_seconds: float
    bytes_per_second: float


@dataclass(frozen=True)
class Diagnosis:
    """What came of an examination that found nothing wrong."""

    findings: Sequence[RankReport]
    network: NetworkSpeed | None
    outcome: Literal["finished", "stopped"] = "finished"
    step: int = 0
    message: str = ""


def examine(loaded: LoadedConfiguration, strategy: Strategy) -> Diagnosis:
    """Examine all ranks. Collective: every rank must call this.

    Raises:
        RanksDifferError: naming each host that differs or lacks something; on every rank alike.
    """
    folder = _nearest(loaded.output)
    probe = folder / _PROBE
    token = _said_by_rank_0(f"{time.time_ns()}-{os.getpid()}", strategy)
    if strategy.rank == 0:
        with suppress(OSError):  # then none sees it
            probe.write_text(token)
    strategy.barrier()
    finding = _finding(loaded.code, strategy, folder, sees_folder=_sees(probe, token))
    told = gather_bytes(json.dumps(asdict(finding)).encode(), strategy.device)
    findings = [RankReport(**json.loads(reply)) for reply in told]
    if strategy.rank == 0:
        with suppress(OSError):
            probe.unlink(missing_ok=True)
    network = _network(strategy) if strategy.world_size > 1 else None
    problems = list(problems_of(findings, num_workers=loaded.values.data.loader.num_workers, folder=folder))
    if problems:
        raise RanksDifferError("\n".join(["not all is well:", *problems]))
    return Diagnosis(findings, network)


def problems_of(findings: Sequence[RankReport], *, num_workers: int, folder: Path) -> Iterator[str]:
    """Yield what is wrong, each with its rank and host."""
    first = findings[0]
    for found in findings:
        who = f"rank {found.rank} (host {found.host})"
        mine, its = asdict(first), asdict(found)
        for name in _ALIKE:
            if its[name] != mine[name]:
                yield f"{who} has {name} {its[name]}, rank 0 (host {first.host}) {mine[name]}"
        if not found.sees_folder:
            yield f"{who} does not see in {folder} what rank 0 (host {first.host}) writes there: the run folder must be shared"
        if found.disk_bytes < _LEAST_DISK_BYTES:
            yield f"{who} has {in_units(found.disk_bytes)} of disk left in {folder}"
        if found.shared_bytes is not None and num_workers and found.shared_bytes < _LEAST_SHARED_BYTES:
            yield f"{who} has {in_units(found.shared_bytes)} of shared memory (/dev/shm), too little for loader workers"


def table(examined: Diagnosis) -> str:
    """Return findings and network as lines for a person."""
    lines = []
    for found in examined.findings:
        shared = "no" if found.shared_bytes is None else in_units(found.shared_bytes)
        lines.append(
            f"rank {found.rank}  host {found.host}  {found.device}  {found.cores} cores  {in_units(found.disk_bytes)} disk  "
            f"{shared} shared memory  python {found.python}  torch {found.torch}  lockstep {found.lockstep}  code {found.code}"
        )
    network = examined.network
    if network is not None:
        speed = f"{in_units(int(network.bytes_per_second))}/s"
        lines.append(f"all-reduce  {network.latency_seconds * 1000:.2f} ms for one number  {speed} for 16 MiB")
    return "\n".join([*lines, "all is well"])


def _finding(code: Path, strategy: Strategy, folder: Path, *, sees_folder: bool) -> RankReport:
    cuda = strategy.device.type == "cuda"
    shared = Path("/dev/shm")  # noqa: S108  # not a file of ours: the kernel's shared memory
    return RankReport(
        rank=strategy.rank,
        host=socket.gethostname(),
        python=platform.python_version(),
        torch=torch.__version__,
        accelerate=installed_version("accelerate"),
        lockstep=installed_version("lockstep-train"),
        device=torch.cuda.get_device_name(strategy.device) if cuda else "cpu",
        code=code_digest(code),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        disk_bytes=shutil.disk_usage(folder).free,
        shared_bytes=shutil.disk_usage(shared).free if shared.is_dir() else None,
        sees_folder=sees_folder,
    )


def _network(strategy: Strategy) -> NetworkSpeed:
    """Time all-reduces; waits for the device after each."""

    def seconds(tensor: torch.Tensor) -> float:
        began = time.perf_counter()
        dist.all_reduce(tensor)
        tensor[0].item()
        return time.perf_counter() - began

    small = torch.zeros(1, device=strategy.device)
    large = torch.zeros(_LARGE_BYTES // 4, device=strategy.device)
    seconds(large)  # connections are made by the first
    latency = statistics.median(seconds(small) for _ in range(20))
    return NetworkSpeed(latency, _LARGE_BYTES / statistics.median(seconds(large) for _ in range(5)))


def _said_by_rank_0(text: str, strategy: Strategy) -> str:
    return gather_bytes(text.encode(), strategy.device)[0].decode()


def _sees(probe: Path, token: str) -> bool:
    until = time.monotonic() + _VISIBLE_SECONDS
    while True:
        with suppress(OSError):
            if probe.read_text() == token:
                return True
        if time.monotonic() > until:
            return False
        time.sleep(0.1)


def _nearest(folder: Path) -> Path:
    """Return a folder, or the nearest one above it that is there."""
    folder = folder.absolute()
    return folder if folder.is_dir() or folder == folder.parent else _nearest(folder.parent)
