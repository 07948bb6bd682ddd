"""What a save costs the training loop: the wait for it, and the dip in throughput while it is written behind the loop.

    python benchmarks/checkpoint_time.py [--parameters 100_000_000] [--rounds 5]

In one run, in turns: one memcpy of the same bytes into memory that has been touched, Lockstep's save, torch.save, and DCP's
async_save. The state is a model with AdamW's moments (12 bytes a parameter). Then the seconds to resume at step 10 and at
step 1,000,000 of a data set of 10^9 samples.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict_saver import async_save

from runtime.checkpoints.async_save import AsyncSaver
from runtime.checkpoints.checkpoint import CheckpointFolder
from runtime.data.batches import Cursor, SlotAssignment, Windows
from runtime.data.loading import loader_factory
from runtime.data.order import IndexOrder
from runtime.data.samples import Samples

WIDTH = 1024


def state_of(parameters: int) -> dict[str, Any]:
    """A model's and AdamW's state after a step."""
    layers = max(1, parameters // WIDTH**2)
    model = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for parameter in model.parameters():
        parameter.grad = None
    return {"model": model.state_dict(), "training": {"optimizer": optimizer.state_dict()}}


def tensors_of(state: Any) -> list[torch.Tensor]:
    """All tensors of nested state."""
    if isinstance(state, torch.Tensor):
        return [state]
    values = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else []
    return [tensor for value in values for tensor in tensors_of(value)]


class Work:
    """A training step of a few milliseconds, to see what a writer takes from it."""

    def __init__(self) -> None:
        self.matrix = torch.randn(384, 384)

    def steps(self, seconds: float = 0.0, until: Callable[[], bool] = lambda: True) -> list[float]:
        """Run for so long and until something is done; return the seconds of each step."""
        taken = []
        started = time.perf_counter()
        while time.perf_counter() - started < seconds or not until():
            before = time.perf_counter()
            torch.mm(self.matrix, self.matrix)
            taken.append(time.perf_counter() - before)
        return taken


def saves(parameters: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Time the ways in turns; seconds, and the median step while writing over the median step in quiet before it."""
    state, work = state_of(parameters), Work()
    tensors = tensors_of(state)
    size = sum(tensor.nbytes for tensor in tensors)
    buffers = [torch.zeros_like(tensor) for tensor in tensors]
    saving = AsyncSaver(CheckpointFolder(folder / "lockstep", keep=1, best=[], warn=print))
    saving.prepare(state)
    saving.wait()
    waits: dict[str, list[float]] = {name: [] for name in ("memcpy", "lockstep", "torch.save", "dcp.async_save")}
    dips: dict[str, list[float]] = {"lockstep": [], "dcp.async_save": []}
    written: dict[str, list[float]] = {"lockstep": [], "dcp.async_save": []}

    def timed(name: str, act: Callable[[], Any]) -> Any:
        os.sync()  # what another way left in the page cache would be written during this one
        started = time.perf_counter()
        result = act()
        waits[name].append(time.perf_counter() - started)
        return result

    def watched(name: str, done: Callable[[], bool]) -> None:
        started = time.perf_counter()
        during = work.steps(until=done)
        written[name].append(time.perf_counter() - started)
        quiet = work.steps(seconds=2.0)
        dips[name].append(statistics.fmean(during) / statistics.fmean(quiet) - 1)

    for number in range(rounds + 1):  # the first round touches memory and is dropped
        timed("memcpy", lambda: [b.copy_(t) for b, t in zip(buffers, tensors, strict=True)])
        timed("lockstep", partial(saving.save, state, step=number + 1, attempt=0, epoch=1, results={}))
        watched("lockstep", lambda: not saving.writing)
        saving.wait()
        assert saving.problem is None, saving.problem
        timed("torch.save", lambda: torch.save(state, folder / "torch.pt"))
        shutil.rmtree(folder / "dcp", ignore_errors=True)
        future = timed("dcp.async_save", lambda: async_save(state, checkpoint_id=str(folder / "dcp")))
        watched("dcp.async_save", future.done)
        future.result()
    median = {name: round(statistics.median(values[1:]), 3) for name, values in waits.items()}
    return {
        "gigabytes": round(size / 1e9, 2),
        "wait_seconds": median,
        "wait_over_memcpy": {name: round(value / median["memcpy"], 2) for name, value in median.items()},
        "written_after_seconds": {name: round(statistics.median(v[1:]), 2) for name, v in written.items()},
        "dip_while_writing": {name: round(statistics.median(v[1:]), 3) for name, v in dips.items()},
        "peak_host_gigabytes": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
    }


class Billion:
    """10^9 samples that are nowhere."""

    deterministic = True

    def __len__(self) -> int:
        return 10**9

    def __getitems__(self, ids: list[int]) -> torch.Tensor:
        return torch.tensor(ids)


def resumption(step: int) -> float:
    """Seconds from a cursor to the first batch at a step of 512 samples."""
    started = time.perf_counter()
    order = IndexOrder(10**9, batch_size=512, seed=0, shuffle=True, drop_last=False)
    windows = Windows(
        Samples(Billion(), seed=0),
        order,
        start=Cursor(0, step),
        stop=lambda cursor, steps: steps >= 1,
        assignment=SlotAssignment(slots=1, world_size=1, rank=0),
        make_loader=loader_factory(
            num_workers=0, prefetch_factor=2, pin_memory=False, timeout_seconds=0, start_method=None
        ),
    )
    assert len(list(windows)) == 1
    return time.perf_counter() - started


def main() -> None:
    """Print one JSON line of each kind."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parameters", type=int, default=100_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write; default: the folder for temporary files")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"# torch {torch.__version__}, python {platform.python_version()}, {os.cpu_count()} cores", flush=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        print(json.dumps(saves(options.parameters, options.rounds, Path(folder))), flush=True)
    times = {step: statistics.median(resumption(step) for _ in range(5)) for step in (10, 1_000_000)}
    print(
        json.dumps({"resume_milliseconds_at_step": {str(s): round(1e3 * t, 1) for s, t in times.items()}}), flush=True
    )


if __name__ == "__main__":
    main()
