"""What each strategy holds on a rank, sends in a step and takes in time, in one run each on this machine.

    python benchmarks/sharding.py [--processes 2 4] [--steps 12] [--width 128] [--layers 4]

A GPT in float32 with AdamW, accumulation over two processes, gloo on CPUs or NCCL on GPUs. Bytes held are counted on every rank
after the last step and stand beside the formula that ``lockstep show`` prints. Collectives and bytes are those that torch's
profiler sees on rank 0, each with its largest tensor; the mean of three steps.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.multiprocessing as mp
from torch.profiler import ProfilerActivity, profile

WATCHED = range(4, 7)  # steps, counted from 1, whose traffic is counted
KINDS = {  # events of torch's profiler
    "gloo:all_reduce": "all-reduce",
    "nccl:all_reduce": "all-reduce",
    "c10d::_allgather_base_": "all-gather",
    "c10d::_reduce_scatter_base_": "reduce-scatter",
}


def strategies() -> dict[str, dict[str, Any]]:
    """What is installed, by name."""
    found: dict[str, dict[str, Any]] = {
        "ddp": {"kind": "ddp"},
        "fsdp": {"kind": "fsdp", "fsdp": {"wrap": ["Block"]}},
        "fsdp, no_sync": {"kind": "fsdp", "fsdp": {"wrap": ["Block"], "no_sync": True}},
        "fsdp, kept gathered": {"kind": "fsdp", "fsdp": {"wrap": ["Block"], "reshard_after_forward": False}},
    }
    if find_spec("deepspeed") is not None and find_spec("runtime.strategies.zero") is not None:
        found |= {f"zero {stage}": {"kind": "zero", "zero": {"stage": stage}} for stage in (1, 2, 3)}
    return found


def configuration(folder: str, strategy: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """The run."""
    return {
        "name": "sharding",
        "output": folder,
        "code": str(Path(__file__).parent),
        "model": {
            "target": "GPT",
            "args": {
                "vocab_size": 512, "context_length": 64, "num_layers": options.layers, "num_heads": 4, "width": options.width,
            },
        },
        "data": {"train": {"target": "sharding:tokens"}},
        "batch": {"global_size": 16, "slots": 8},
        "objective": "NextTokenLoss",
        "optimizer": {"target": "AdamW", "args": {"lr": 1e-3}, "max_grad_norm": 1.0},
        "strategy": strategy,
        "limit": {"steps": options.steps},
        "reporting": {"every": f"{options.steps - 3} steps", "progress": False},
    }  # fmt: skip


def tokens() -> Any:
    """Sequences at random."""
    from torch.utils.data import TensorDataset

    drawn = torch.randint(0, 512, (256, 65), generator=torch.Generator().manual_seed(0))
    return TensorDataset(drawn[:, :-1], drawn[:, 1:])


def run(rank: int, world: tuple[int, int], folder: str, strategy: dict[str, Any], options: Any) -> None:
    """Train in one process of several, and leave what was measured in a file."""
    world_size, port = world
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    if not torch.cuda.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"
    from runtime.run import Run
    from runtime.session import train

    told: dict[str, Any] = {}
    profiler = profile(activities=[ProfilerActivity.CPU], record_shapes=True)
    prepare, close = Run._parts, Run._close

    def parts(self: Any, module: Any) -> Any:
        step = self._strategy.step

        def watched(*args: Any, **kwargs: Any) -> Any:
            update = step(*args, **kwargs)
            number = self._progress.step + 1
            if number == WATCHED.start - 1:
                profiler.start()
            elif number == WATCHED.stop - 1:
                profiler.stop()
            return update

        self._strategy.step = watched
        return prepare(self, module)

    def closed(self: Any, outcome: Any) -> Any:
        states = [
            t
            for s in self._state.optimizer.state.values()
            for t in s.values()
            if isinstance(t, torch.Tensor) and t.ndim
        ]
        told["parameters"] = sum(piece.nbytes for piece in self._strategy.weights().pieces().values())
        told["optimizer"] = sum(getattr(tensor, "_local_tensor", tensor).nbytes for tensor in states)
        return close(self, outcome)

    Run._parts, Run._close = parts, closed  # type: ignore[method-assign]
    train(configuration(folder, strategy, options))
    told["traffic"] = traffic(profiler)
    Path(folder, f"rank-{rank}.json").write_text(json.dumps(told))


def traffic(profiler: Any) -> dict[str, tuple[float, float]]:
    """Return, for each kind of collective, how many a step there were and how many bytes went in."""
    found: dict[str, list[int]] = {}
    for event in profiler.events():
        kind = KINDS.get(event.name)
        if kind is None:
            continue
        # A gathered tensor is counted as a whole, which is what a reduce-scatter begins with.
        sizes = [size(shape) for shape in event.input_shapes]
        if max(sizes, default=0) > 8:  # messages of a few numbers are the loop's own
            found.setdefault(kind, []).append(4 * max(sizes))
    return {kind: (len(sizes) / len(WATCHED), sum(sizes) / len(WATCHED)) for kind, sizes in found.items()}


def size(shape: Any) -> int:
    """Return how many values a tensor of a shape has, or the largest of several."""
    if not shape:
        return 0
    if isinstance(shape[0], list | tuple):
        return sum(map(size, shape))
    return torch.Size(shape).numel()


def measured(name: str, strategy: dict[str, Any], processes: int, options: argparse.Namespace) -> str:
    """Run one strategy and return its row."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        mp.spawn(run, ((processes, port), folder, strategy, options), nprocs=processes)
        ranks = [json.loads(Path(folder, f"rank-{rank}.json").read_text()) for rank in range(processes)]
        records = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    start, first = records[0], next(record for record in records if record["event"] == "train")
    formula = start["state_bytes"]
    most: Callable[[str], int] = lambda what: max(rank[what] for rank in ranks)  # noqa: E731
    sent = "; ".join(
        f"{count:.0f} {kind} of {total / 2**20:.2f} MiB" for kind, (count, total) in sorted(ranks[0]["traffic"].items())
    )
    return (
        f"| {name} | {processes} | {most('parameters') / 2**20:.2f} ({formula['parameters'] / 2**20:.2f}) "
        f"| {most('optimizer') / 2**20:.2f} ({(formula['optimizer'] or 0) / 2**20:.2f}) | {sent} "
        f"| {first['samples_per_second'] / 16:.2f} |"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {'GPUs, NCCL' if torch.cuda.is_available() else 'CPUs, gloo'}")
    print(
        "| strategy | processes | parameters, MiB (formula) | optimizer, MiB (formula) | a step sends | steps a second |"
    )
    print("|---|---|---|---|---|---|")
    for processes in options.processes:
        for name, strategy in strategies().items():
            print(measured(name, strategy, processes, options), flush=True)


if __name__ == "__main__":
    main()
