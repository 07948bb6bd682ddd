"""Time per step over hand-written PyTorch loops, in the same run, interleaved: ratios, since absolute times do not carry over.

    python benchmarks/step_time.py [--pairs 7] [--only mlp|gpt]

Two bare loops are compared with. ``usual``: torch's default DataLoader over a TensorDataset and the default optimizer.
``careful``: whole-batch indexing and the fused optimizer as well. Both are DDP loops with two processes, accumulate with
no_sync, and check nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from runtime.model_zoo import GPT, MLP

SIZES: dict[str, dict[str, Any]] = {
    # a tiny MLP: a step of about half a millisecond
    "mlp": {"samples": 512 * 64, "batch": 64, "steps": 400, "warm": 50},
    "gpt": {"samples": 64 * 16, "batch": 16, "steps": 12, "warm": 2},
}


def data(kind: str) -> TensorDataset:
    """Random samples, the same for every way."""
    generator = torch.Generator().manual_seed(0)
    count = SIZES[kind]["samples"]
    if kind == "mlp":
        inputs = torch.randn(count, 64, generator=generator)
        return TensorDataset(inputs, torch.randint(0, 10, (count,), generator=generator))
    tokens = torch.randint(0, 257, (count, 129), generator=generator)
    return TensorDataset(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


def model(kind: str) -> nn.Module:
    """The model, initialised alike for every way."""
    torch.manual_seed(0)
    if kind == "mlp":
        return MLP(64, [256, 256], 10)
    return GPT(257, 128, num_layers=4, num_heads=4, width=128)


def loss_of(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy over samples or tokens."""
    return F.cross_entropy(output.flatten(0, -2), target.flatten())


def bare(kind: str, *, careful: bool, world_size: int) -> float:
    """Seconds per step of a hand-written loop."""
    size = SIZES[kind]
    samples, net = data(kind), model(kind)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, **({"fused": True} if careful else {}))
    wrapped = DistributedDataParallel(net, gradient_as_bucket_view=True) if world_size > 1 else net
    rank = dist.get_rank() if world_size > 1 else 0
    local = size["batch"] // world_size

    def usual_batches() -> Any:
        sampler = None
        if world_size > 1:
            sampler = torch.utils.data.distributed.DistributedSampler(samples, world_size, rank)
        while True:
            yield from DataLoader(samples, batch_size=local, shuffle=sampler is None, sampler=sampler, drop_last=True)

    def careful_batches() -> Any:
        generator = torch.Generator().manual_seed(0)
        while True:
            order = torch.randperm(len(samples), generator=generator)
            for start in range(0, len(samples) - size["batch"] + 1, size["batch"]):
                yield samples[order[start + rank * local : start + (rank + 1) * local]]

    batches = careful_batches() if careful else usual_batches()
    started = 0.0
    for step in range(size["warm"] + size["steps"]):
        if step == size["warm"]:
            started = time.perf_counter()
        inputs, target = next(batches)
        loss_of(wrapped(inputs), target).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return (time.perf_counter() - started) / size["steps"]


def lockstep(kind: str, *, world_size: int) -> float:
    """Seconds per step of the same training through Lockstep, from a configuration, nothing left out but reports and saves."""
    from runtime import loop
    from runtime.session import train

    size, times = SIZES[kind], []
    advance = loop.Progress.advance

    def noting(self: Any, window: Any, *, applied: bool) -> None:
        advance(self, window, applied=applied)
        if self.step in (size["warm"], size["warm"] + size["steps"]):
            times.append(time.perf_counter())

    loop.Progress.advance = noting  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        if world_size > 1:
            folders: list[Any] = [folder]
            dist.broadcast_object_list(folders)
            folder = folders[0]
        config = {
            "output": f"{folder}/run",
            "code": str(Path(__file__).parent),
            "model": {"target": "step_time:model", "args": {"kind": kind}},
            "data": {"train": {"target": "step_time:data", "args": {"kind": kind}}},
            "batch": {"global_size": size["batch"]},
            "objective": "CrossEntropyLoss" if kind == "mlp" else "NextTokenLoss",
            "optimizer": {"target": "AdamW", "args": {"lr": 1e-3}},
            "limit": {"steps": size["warm"] + size["steps"]},
            "checkpoint": {"every": "100000 steps"},
            "reporting": {"every": "50 steps", "progress": False},
        }
        with Path(os.devnull).open("w") as nowhere:
            stdout, sys.stdout = sys.stdout, nowhere
            try:
                train(config)
            finally:
                sys.stdout = stdout
                loop.Progress.advance = advance  # type: ignore[method-assign]
        if world_size > 1:
            dist.barrier()
    return (times[1] - times[0]) / size["steps"]


def measure(kind: str, pairs: int, world_size: int) -> None:
    """Print one JSON line of medians and ratios from rank 0."""
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group("gloo")
    ways = {
        "usual": lambda: bare(kind, careful=False, world_size=world_size),
        "careful": lambda: bare(kind, careful=True, world_size=world_size),
        "lockstep": lambda: lockstep(kind, world_size=world_size),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(pairs):
        for name, way in ways.items():
            seconds[name].append(way())
    if not dist.is_initialized() or dist.get_rank() == 0:
        ratios = {
            f"over_{name}": round(
                statistics.median(a / b for a, b in zip(seconds["lockstep"], seconds[name], strict=True)), 3
            )
            for name in ("usual", "careful")
        }
        medians = {name: round(1e3 * statistics.median(values), 3) for name, values in seconds.items()}
        print(json.dumps({"model": kind, "processes": world_size, "pairs": pairs, "ms": medians, **ratios}), flush=True)
    os._exit(0)  # a gloo thread may abort an interpreter that shuts down in order


def main() -> None:
    """Start one process tree per model and world size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--only", choices=sorted(SIZES))
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure[0], options.pairs, int(options.measure[1]))
    print(f"# torch {torch.__version__}, python {platform.python_version()}, {os.cpu_count()} cores", flush=True)
    for kind in [options.only] if options.only else ["mlp", "gpt"]:
        for world_size in (1, 2):
            line = [sys.executable, __file__, "--pairs", str(options.pairs), "--measure", kind, str(world_size)]
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = str(free.getsockname()[1])
            processes = []
            for rank in range(world_size):
                added = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
                if world_size > 1:
                    added |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
                    added["MASTER_PORT"] = port
                processes.append(subprocess.Popen(line, env={**os.environ, **added}))
            for process in processes:
                if process.wait():
                    sys.exit(1)


if __name__ == "__main__":
    main()
