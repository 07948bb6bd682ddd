"""Time per step over hand-written PyTorch loops, in the same run, in turns: ratios, since absolute times do not carry over.

    python benchmarks/step_time.py [--pairs 100] [--only mlp|gpt] [--determinism exact]

Two bare loops are compared with. ``usual``: torch's default DataLoader over a TensorDataset and the default optimizer.
``careful``: whole-batch indexing and the fused optimizer as well. Both are DDP loops with two processes, accumulate with
no_sync, and check nothing. Printed ratios are [median, lower quartile, upper quartile] over pairs of neighbouring blocks.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
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
    "mlp": {"samples": 512 * 64, "batch": 64, "steps": 40},
    "gpt": {"samples": 64 * 16, "batch": 16, "steps": 2},
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


class Bare:
    """A hand-written loop that can be run a few steps at a time."""

    def __init__(self, kind: str, *, careful: bool, world_size: int) -> None:
        self._batch_size = SIZES[kind]["batch"]
        self._samples, self._careful = data(kind), careful
        self._net = model(kind)
        self._optimizer = torch.optim.AdamW(self._net.parameters(), lr=1e-3, fused=True if careful else None)
        self._wrapped = (
            DistributedDataParallel(self._net, gradient_as_bucket_view=True) if world_size > 1 else self._net
        )
        self._world_size, self._rank = world_size, dist.get_rank() if world_size > 1 else 0
        self._local = self._batch_size // world_size
        self._batches = self._careful_batches() if careful else self._usual_batches()

    def seconds(self, steps: int) -> float:
        """Run some steps and return what they took, with torch's own settings and python's garbage collector as it comes."""
        deterministic = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(False)
        gc.enable()
        started = time.perf_counter()
        for _ in range(steps):
            inputs, target = next(self._batches)
            loss_of(self._wrapped(inputs), target).backward()  # type: ignore[no-untyped-call]
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
        taken = time.perf_counter() - started
        torch.use_deterministic_algorithms(deterministic)
        return taken

    def _usual_batches(self) -> Iterator[Any]:
        sampler: torch.utils.data.distributed.DistributedSampler[Any] | None = None
        if self._world_size > 1:
            sampler = torch.utils.data.distributed.DistributedSampler(self._samples, self._world_size, self._rank)
        while True:
            yield from DataLoader(
                self._samples, batch_size=self._local, shuffle=sampler is None, sampler=sampler, drop_last=True
            )

    def _careful_batches(self) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(0)
        while True:
            order = torch.randperm(len(self._samples), generator=generator)
            for start in range(0, len(self._samples) - self._batch_size + 1, self._batch_size):
                yield self._samples[order[start + self._rank * self._local : start + (self._rank + 1) * self._local]]


def measure(kind: str, pairs: int, world_size: int, determinism: str) -> None:
    """Print one JSON line of medians and ratios from rank 0.

    The machine's speed drifts within seconds, so the ways take turns every few steps: Lockstep trains, and at the end of
    each of its blocks the bare loops run a block each.
    """
    from runtime.session import train
    from runtime.training.progress import Progress

    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group("gloo")
    steps = SIZES[kind]["steps"]
    others = {name: Bare(kind, careful=name == "careful", world_size=world_size) for name in ("usual", "careful")}
    seconds: dict[str, list[float]] = {"usual": [], "careful": [], "lockstep": []}
    for bare in others.values():
        bare.seconds(steps)
    advance, since = Progress.advance, 0.0

    def take_turns(self: Any, window: Any) -> None:
        nonlocal since
        advance(self, window)
        if self.step % steps:
            return
        if self.step > steps:  # the first block is a warm-up
            seconds["lockstep"].append(time.perf_counter() - since)
            collecting = gc.isenabled()
            for name, bare in others.items():
                seconds[name].append(bare.seconds(steps))
            if not collecting:
                gc.disable()
        since = time.perf_counter()

    Progress.advance = take_turns  # type: ignore[method-assign]
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
            "batch": {"global_size": SIZES[kind]["batch"]},
            "objective": "CrossEntropyLoss" if kind == "mlp" else "NextTokenLoss",
            "optimizer": {"target": "AdamW", "args": {"lr": 1e-3}},
            "limit": {"steps": steps * (pairs + 1)},
            "checkpoint": {"every": "1000000 steps"},
            "reporting": {"every": "50 steps", "progress": False},
            "determinism": determinism,
        }
        with Path(os.devnull).open("w") as nowhere:
            stdout, sys.stdout = sys.stdout, nowhere
            try:
                train(config)
            finally:
                sys.stdout = stdout
        if world_size > 1:
            dist.barrier()
    if not dist.is_initialized() or dist.get_rank() == 0:
        ratios = {}
        for name in others:
            of_pairs = [a / b for a, b in zip(seconds["lockstep"], seconds[name], strict=True)]
            low, median, high = statistics.quantiles(of_pairs, n=4)
            ratios[f"over_{name}"] = [round(value, 3) for value in (median, low, high)]
        medians = {name: round(1e3 * statistics.median(values) / steps, 3) for name, values in seconds.items()}
        run = {"model": kind, "processes": world_size, "determinism": determinism, "pairs": pairs}
        print(json.dumps({**run, "ms": medians, **ratios}), flush=True)
    os._exit(0)  # a gloo thread may abort an interpreter that shuts down in order


def main() -> None:
    """Start one process tree per model and world size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=100, help="blocks of each way")
    parser.add_argument("--only", choices=sorted(SIZES))
    parser.add_argument("--determinism", choices=["exact", "strict"], default="strict")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure[0], options.pairs, int(options.measure[1]), options.determinism)
    print(f"# torch {torch.__version__}, python {platform.python_version()}, {os.cpu_count()} cores", flush=True)
    for kind in [options.only] if options.only else ["mlp", "gpt"]:
        for world_size in (1, 2):
            asked = ["--pairs", str(options.pairs), "--determinism", options.determinism]
            line = [sys.executable, __file__, *asked, "--measure", kind, str(world_size)]
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
