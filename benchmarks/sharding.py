"""What each strategy holds on a rank, sends in a step and takes in time, in one run each on this machine.

    python benchmarks/sharding.py [--processes 2 4] [--precision fp32 bf16] [--strategies ddp fsdp …] [--rounds 1]

A GPT with AdamW, accumulation on two processes, gloo on CPUs or NCCL on GPUs. Bytes held are counted on every rank
(held_bytes.py) and stand beside the formula that ``lockstep show`` prints. Collectives and bytes are those that torch's
profiler sees on rank 0, each with its largest tensor; the mean of three steps. Strategies take turns; of the steps a second the
median of the rounds is told.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import tempfile
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.multiprocessing as mp
from held_bytes import held_bytes
from torch.profiler import ProfilerActivity, profile

WATCHED = range(4, 7)  # steps, counted from 1, whose traffic is counted
HELD = ("parameters", "gradients", "optimizer")
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
    if find_spec("deepspeed") is not None and find_spec("runtime.strategies.zero.strategy") is not None:
        found |= {f"zero {stage}": {"kind": "zero", "zero": {"stage": stage}} for stage in (1, 2, 3)}
    return found


def configuration(folder: str, strategy: dict[str, Any], precision: str, options: argparse.Namespace) -> dict[str, Any]:
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
        "precision": precision,
        "limit": {"steps": options.steps},
        "reporting": {"every": f"{options.steps - 3} steps", "progress": False},
    }  # fmt: skip


def tokens() -> Any:
    """Sequences at random."""
    from torch.utils.data import TensorDataset

    drawn = torch.randint(0, 512, (256, 65), generator=torch.Generator().manual_seed(0))
    return TensorDataset(drawn[:, :-1], drawn[:, 1:])


def run(rank: int, world: tuple[int, int], config: dict[str, Any]) -> None:
    """Train in one process of several, and leave what was measured in a file."""
    world_size, port = world
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    if not torch.cuda.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"
    from runtime.run.trainer import Trainer
    from runtime.session import train

    profiler = profile(activities=[ProfilerActivity.CPU], record_shapes=True)
    make_steps = Trainer.train

    def watching(self: Any, windows: Any) -> Any:
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
        return make_steps(self, windows)

    Trainer.train = watching  # type: ignore[method-assign]
    with held_bytes() as held:
        train(config)
    half = (
        config["precision"] == "bf16" and config["strategy"]["kind"] == "zero"
    )  # which then reduces and gathers in it
    told = {"held": held, "traffic": traffic(profiler, bytes_each=2 if half else 4)}
    Path(config["output"], f"rank-{rank}.json").write_text(json.dumps(told))


def traffic(profiler: Any, *, bytes_each: int) -> dict[str, tuple[float, float]]:
    """Return, for each kind of collective, how many a step there were and how many bytes went in."""
    found: dict[str, list[int]] = {}
    for event in profiler.events():
        kind = KINDS.get(event.name)
        if kind is None:
            continue
        # A gathered tensor is counted as a whole, which is what a reduce-scatter begins with.
        sizes = [size(shape) for shape in event.input_shapes]
        if max(sizes, default=0) > 8:  # messages of a few numbers are the loop's own
            found.setdefault(kind, []).append(bytes_each * max(sizes))
    for inner in found.get("reduce-scatter", []) if torch.distributed.is_gloo_available() else ():
        if inner in found.get("all-reduce", []):  # gloo's reduce-scatter is an all-reduce of its own
            found["all-reduce"].remove(inner)
    found = {kind: sizes for kind, sizes in found.items() if sizes}
    return {kind: (len(sizes) / len(WATCHED), sum(sizes) / len(WATCHED)) for kind, sizes in found.items()}


def size(shape: Any) -> int:
    """Return how many values a tensor of a shape has, or the largest of several."""
    if not shape:
        return 0
    if isinstance(shape[0], list | tuple):
        return sum(map(size, shape))
    return torch.Size(shape).numel()


def measured(config: dict[str, Any], processes: int) -> dict[str, Any]:
    """Run once; return the bytes of the rank that holds most, those of the formula, rank 0's traffic, and steps a second."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = Path(config["output"])
    mp.spawn(run, ((processes, port), config), nprocs=processes)  # type: ignore[attr-defined, no-untyped-call]
    ranks = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(processes)]
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    first = next(record for record in records if record["event"] == "train")
    return {
        "held": {what: max(rank["held"][what] for rank in ranks) for what in HELD},
        "formula": {what: records[0]["state_bytes"][what] for what in HELD},
        "traffic": ranks[0]["traffic"],
        "steps_per_second": first["samples_per_second"] / config["batch"]["global_size"],
    }


def table(processes: int, precision: str, options: argparse.Namespace) -> None:
    """Run all strategies in turns, and print their rows."""
    chosen = {name: strategy for name, strategy in strategies().items() if name in (options.strategies or strategies())}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen}
    for _ in range(options.rounds):
        for name, strategy in chosen.items():
            with tempfile.TemporaryDirectory() as folder:
                found[name].append(measured(configuration(folder, strategy, precision, options), processes))
    speed = {name: median(each["steps_per_second"] for each in rounds) for name, rounds in found.items()}
    for name, (first, *_) in found.items():
        held = " | ".join(
            f"{first['held'][what] / 2**20:.2f} ({(first['formula'][what] or 0) / 2**20:.2f})" for what in HELD
        )
        sent = "; ".join(
            f"{count:.0f} {kind} of {total / 2**20:.2f} MiB"
            for kind, (count, total) in sorted(first["traffic"].items())
        )
        over_ddp = f"{speed[name] / speed['ddp']:.2f}" if "ddp" in speed else ""
        print(f"| {name} | {processes} | {precision} | {held} | {sent} | {speed[name]:.2f} | {over_ddp} |", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--precision", nargs="+", default=["fp32"], choices=["fp32", "bf16"])
    parser.add_argument("--strategies", nargs="+", choices=list(strategies()), help="default: all")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {'GPUs, NCCL' if torch.cuda.is_available() else 'CPUs, gloo'}")
    columns = [f"{what}, MiB (formula)" for what in HELD]
    heads = ["strategy", "processes", "precision", *columns, "a step sends", "steps a second", "over ddp"]
    print(f"| {' | '.join(heads)} |")
    print("|---" * len(heads) + "|")
    for processes in options.processes:
        for precision in options.precision:
            table(processes, precision, options)


if __name__ == "__main__":
    main()
