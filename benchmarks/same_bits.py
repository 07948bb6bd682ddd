"""The digest of a run's state after some steps, on 1, 2 and 4 processes: ``exact`` with ddp and fsdp, and ``strict``.

    python benchmarks/same_bits.py [--steps 50] [--processes 1 2 4] configs/digits.yaml configs/gpt_stdlib.yaml

Prints a row for each YAML, ``determinism`` and ``strategy.kind``. Equal digests mean equal
weights, optimizer state and buffers, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

_ROWS = (("exact", "ddp"), ("exact", "fsdp"), ("strict", "ddp"))


def digest(yaml: Path, mode: str, kind: str, processes: int, *, steps: int, slots: int, overrides: list[str]) -> str:
    """Train in separate processes, and return the digest of the last checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        options = [
            f"output={folder}/run",
            f"determinism={mode}",
            f"strategy={{kind: {kind}}}",
            f"batch.slots={slots}",
            f"limit={{steps: {steps}}}",
            "checkpoint={every: 1000000 steps}",
            "reporting={progress: false}",
            *overrides,
        ]
        line = [sys.executable, "-m", "runtime.cli", "train", str(yaml), "--processes", str(processes), *options]
        done = subprocess.run(
            line, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        if done.returncode:
            sys.exit(f"{' '.join(line)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        (checkpoint,) = Path(folder, "run", "checkpoints").glob(f"step-{steps:08d}*")
        found: str = json.loads((checkpoint / "manifest.json").read_text())["digest"]
        return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("yaml", nargs="+", type=Path)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a further key of every YAML")
    options = parser.parse_args()
    print(
        "| run | determinism | strategy | "
        + " | ".join(f"{n} process{'es' * (n > 1)}" for n in options.processes)
        + " |"
    )
    print("|---|---|---|" + "---|" * len(options.processes))
    for yaml in options.yaml:
        for mode, kind in _ROWS:
            digests = [
                digest(yaml, mode, kind, n, steps=options.steps, slots=options.slots, overrides=options.set)
                for n in options.processes
            ]
            print(f"| `{yaml}` | {mode} | {kind} | " + " | ".join(f"`{each}`" for each in digests) + " |", flush=True)


if __name__ == "__main__":
    main()
