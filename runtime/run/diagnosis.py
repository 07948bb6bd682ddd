"""``lockstep doctor``: compare the environments of all ranks, and measure the network between them."""

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

_MUST_MATCH = ("python", "torch", "accelerate", "lockstep", "device", "code")
_LEAST_DISK_BYTES = 1 << 30
_LEAST_SHARED_BYTES = 256 << 20  # docker's default is 64 MiB, with which loader workers die of SIGBUS
_PROBE = ".lockstep-doctor"
_LARGE_BYTES = 16 << 20
_VISIBLE_SECONDS = 10.0  # a file server may be slow to show another machine's file


@dataclass(frozen=True)
class RankReport:
    """Environment of one rank.

    Args:
        code: digest of the Python files of the run's code folder.
        disk_bytes: free disk space at the (possibly future) run folder; ``shared_bytes``: free shared memory, None without any.
        sees_folder: whether it sees the file that rank 0 wrote there.
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
    """Speed of an all-reduce over all ranks.

    Args:
        latency_seconds: for one number, the median.
        bytes_per_second: per rank, for 16 MiB.
    """

    latency_seconds: float
    bytes_per_second: float


@dataclass(frozen=True)
class Diagnosis:
    """Result of a diagnosis without problems."""

    findings: Sequence[RankReport]
    network: NetworkSpeed | None
    outcome: Literal["finished", "stopped"] = "finished"
    step: int = 0
    message: str = ""


def examine(loaded: LoadedConfiguration, strategy: Strategy) -> Diagnosis:
    """Examine all ranks. Collective: every rank must call this.

    Raises:
        RanksDifferError: names each host that differs or lacks something; equal on every rank.
    """
    folder = _nearest_existing(loaded.output)
    probe = folder / _PROBE
    token = _from_rank_0(f"{time.time_ns()}-{os.getpid()}", strategy)
    if strategy.rank == 0:
        with suppress(OSError):  # then no rank sees it
            probe.write_text(token)
    strategy.barrier()
    report = _report(loaded.code, strategy, folder, sees_folder=_sees(probe, token))
    replies = gather_bytes(json.dumps(asdict(report)).encode(), strategy.device)
    findings = [RankReport(**json.loads(reply)) for reply in replies]
    if strategy.rank == 0:
        with suppress(OSError):
            probe.unlink(missing_ok=True)
    network = _network(strategy) if strategy.world_size > 1 else None
    problems = list(problems_of(findings, num_workers=loaded.values.data.loader.num_workers, folder=folder))
    if problems:
        raise RanksDifferError("\n".join(["problems found:", *problems]))
    return Diagnosis(findings, network)


def problems_of(findings: Sequence[RankReport], *, num_workers: int, folder: Path) -> Iterator[str]:
    """Yield one line for each problem, with its rank and host."""
    first = findings[0]
    for report in findings:
        who = f"rank {report.rank} (host {report.host})"
        expected, actual = asdict(first), asdict(report)
        for name in _MUST_MATCH:
            if actual[name] != expected[name]:
                yield f"{who} has {name} {actual[name]}, rank 0 (host {first.host}) {expected[name]}"
        if not report.sees_folder:
            yield f"{who} does not see in {folder} what rank 0 (host {first.host}) writes there: the run folder must be shared"
        if report.disk_bytes < _LEAST_DISK_BYTES:
            yield f"{who} has {in_units(report.disk_bytes)} of disk left in {folder}"
        if report.shared_bytes is not None and num_workers and report.shared_bytes < _LEAST_SHARED_BYTES:
            yield f"{who} has {in_units(report.shared_bytes)} of shared memory (/dev/shm), too little for loader workers"


def table(diagnosis: Diagnosis) -> str:
    """Format the diagnosis for the terminal."""
    lines = []
    for r in diagnosis.findings:
        shared = "no" if r.shared_bytes is None else in_units(r.shared_bytes)
        lines.append(
            f"rank {r.rank}  host {r.host}  {r.device}  {r.cores} cores  {in_units(r.disk_bytes)} disk  "
            f"{shared} shared memory  python {r.python}  torch {r.torch}  lockstep {r.lockstep}  code {r.code}"
        )
    network = diagnosis.network
    if network is not None:
        speed = f"{in_units(int(network.bytes_per_second))}/s"
        lines.append(f"all-reduce  {network.latency_seconds * 1000:.2f} ms for one number  {speed} for 16 MiB")
    return "\n".join([*lines, "no problems found"])


def _report(code: Path, strategy: Strategy, folder: Path, *, sees_folder: bool) -> RankReport:
    cuda = strategy.device.type == "cuda"
    shared = Path("/dev/shm")  # noqa: S108  # not a temporary file: the kernel's shared memory
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
    seconds(large)  # the first call opens the connections
    latency = statistics.median(seconds(small) for _ in range(20))
    return NetworkSpeed(latency, _LARGE_BYTES / statistics.median(seconds(large) for _ in range(5)))


def _from_rank_0(text: str, strategy: Strategy) -> str:
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


def _nearest_existing(folder: Path) -> Path:
    """Return a folder, or its nearest existing parent."""
    folder = folder.absolute()
    return folder if folder.is_dir() or folder == folder.parent else _nearest_existing(folder.parent)
