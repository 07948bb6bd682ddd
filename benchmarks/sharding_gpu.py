"""ddp, fsdp and zero with offloading on one GPU: tokens per second, peak memory, and the losses, which must agree.

    python benchmarks/sharding_gpu.py [--steps 20] [--layers 24] [--width 1024]

A GPT of 355 million parameters (GPT-2 medium's shape) in bf16 with AdamW, on random tokens, each strategy in a process of its
own. The first steps, in which kernels are chosen and memory is taken, are left out of the rate. Prints a JSON object with date,
device and versions; ends with 1 if losses differ by more than bf16's rounding.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import TensorDataset

WARM_UP = 5  # steps
LARGEST_DIFFERENCE = 0.02  # relative, between losses of bf16 runs: their weights are rounded at different places
VOCABULARY, CONTEXT, SEQUENCES = 50304, 1024, 64
STRATEGIES: dict[str, dict[str, Any]] = {
    "ddp": {"kind": "ddp"},
    "fsdp": {"kind": "fsdp", "fsdp": {"wrap": ["Block"]}},
    "zero 2": {"kind": "zero", "zero": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": True}}},
    "zero 3": {
        "kind": "zero",
        "zero": {
            "stage": 3,
            "offload_optimizer": {"device": "cpu", "pin_memory": True},
            "offload_parameters": {"device": "cpu", "pin_memory": True},
        },
    },
}


def random_tokens() -> TensorDataset:
    """Sequences and their next tokens, the same for every strategy."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCABULARY, (SEQUENCES, CONTEXT + 1), generator=generator)
    return TensorDataset(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


def configuration(folder: Path, strategy: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """The run."""
    size = {"num_layers": options.layers, "num_heads": options.width // 64, "width": options.width}
    return {
        "name": "sharding_gpu",
        "output": str(folder),
        "code": str(Path(__file__).parent),
        "model": {"target": "GPT", "args": {"vocab_size": VOCABULARY, "context_length": CONTEXT, **size}},
        "data": {"train": {"target": "sharding_gpu:random_tokens"}},
        "batch": {"global_size": 8, "micro_size": 4},
        "objective": "NextTokenLoss",
        "optimizer": {"target": "AdamW", "args": {"lr": 1e-4}, "max_grad_norm": 1.0},
        "precision": "bf16",
        "limit": {"steps": options.steps},
        "strategy": strategy,
        "checkpoint": {"every": "1000000 steps"},
        "reporting": {"every": "1 step", "progress": False},
    }


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train under one strategy, in this process."""
    from runtime.session import train

    with tempfile.TemporaryDirectory() as folder:
        train(configuration(Path(folder) / "run", STRATEGIES[name], options))
        records = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if record["event"] == "train"]
    return {
        "tokens_per_second": round(sum(s["tokens_per_second"] for s in steps[WARM_UP:]) / len(steps[WARM_UP:])),
        "peak_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "losses": [round(step["loss"], 5) for step in steps],
    }


def main() -> int:
    """Measure every strategy that is installed, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--only", choices=STRATEGIES, help="measure this one, in this process")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            "needs a GPU: this machine has none that torch can use (benchmarks/sharding.py runs on CPUs)",
            file=sys.stderr,
        )
        return 2
    if options.steps <= WARM_UP:
        parser.error(f"--steps must be above {WARM_UP}, which are left out of the rate")
    if options.only is not None:
        print(json.dumps(measure(options.only, options)))
        return 0
    results: dict[str, Any] = {}
    sizes = ["--steps", str(options.steps), "--layers", str(options.layers), "--width", str(options.width)]
    for name, strategy in STRATEGIES.items():
        if strategy["kind"] == "zero" and find_spec("deepspeed") is None:
            results[name] = "not measured: pip install 'lockstep-train[deepspeed]'"
            continue
        line = [sys.executable, __file__, "--only", name, *sizes]
        done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=False)
        results[name] = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else "failed"
    measured = [result for result in results.values() if isinstance(result, dict)]
    worst = max(
        (
            abs(loss - expected) / expected
            for result in measured
            for loss, expected in zip(result["losses"], measured[0]["losses"], strict=True)
        ),
        default=0.0,
    )
    versions = {name: version(name) for name in ("torch", "accelerate", "deepspeed") if find_spec(name)}
    facts = {"date": datetime.now(UTC).date().isoformat(), "device": torch.cuda.get_device_name(), **versions}
    print(json.dumps({**facts, "results": results, "largest_loss_difference": worst}, indent=1))
    return 0 if "failed" not in results.values() and worst < LARGEST_DIFFERENCE else 1


if __name__ == "__main__":
    sys.exit(main())
