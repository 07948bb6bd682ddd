"""Seconds from starting a process to its first step, with and without ``accelerate launch``, with and without metrics.

    python benchmarks/startup_time.py [--runs 5]

Beside them a bare script that imports torch and takes one step, since absolute times do not carry over.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONFIG = """
output: {folder}/run
resume: auto
code: {code}
model: {{target: MLP, args: {{in_features: 64, hidden: [256, 256], out_features: 10}}}}
data:
  train: {{target: "step_time:data", args: {{kind: mlp}}}}
  validation: {{target: "step_time:data", args: {{kind: mlp}}}}
batch: {{global_size: 64}}
objective: CrossEntropyLoss
optimizer: {{target: AdamW, args: {{lr: 0.001}}}}
limit: {{steps: 1000000}}
evaluation: {{every: 1000000 steps, metrics: {metrics}}}
checkpoint: {{every: 1000000 steps}}
reporting: {{every: 1 step, progress: false}}
"""
METRICS = "{accuracy: {target: Accuracy, args: {task: multiclass, num_classes: 10}}}"
BARE = (
    "import torch; net = torch.nn.Linear(64, 10); o = torch.optim.AdamW(net.parameters(), fused=True); "
    "net(torch.randn(64, 64)).sum().backward(); o.step(); print('step 1', flush=True)"
)


def seconds_to_first_step(line: list[str], folder: str) -> float:
    """Start a process, wait for its first report, end it."""
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    started = time.perf_counter()
    process = subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment, cwd=folder, process_group=0
    )
    assert process.stdout is not None
    for text in process.stdout:
        if "step 1" in text:
            break
    else:
        sys.exit(f"no first step: {line}")
    seconds = time.perf_counter() - started
    os.killpg(process.pid, 9)
    process.wait()
    return seconds


def main() -> None:
    """Measure every way in turn, several times over."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    train = str(ROOT / "runtime" / "train.py")
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "1",
        "--num_machines",
        "1",
    ]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    two = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"]
    two = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        *two,
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ]
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        configs = {}
        for name, metrics in (("without metrics", "{}"), ("with metrics", METRICS)):
            configs[name] = f"{folder}/{name.split()[0]}.yaml"
            Path(configs[name]).write_text(CONFIG.format(folder=folder, code=ROOT / "benchmarks", metrics=metrics))
        ways = {
            "bare torch": [sys.executable, "-c", BARE],
            "python, without metrics": [sys.executable, train, configs["without metrics"]],
            "python, with metrics": [sys.executable, train, configs["with metrics"]],
            "accelerate launch, without metrics": [*launch, train, configs["without metrics"]],
            "accelerate launch, with metrics": [*launch, train, configs["with metrics"]],
            "accelerate launch, 2 processes, without metrics": [*two, train, configs["without metrics"]],
        }
        for _ in range(options.runs):
            for name, line in ways.items():
                seconds.setdefault(name, []).append(seconds_to_first_step(line, folder))
    for name, values in seconds.items():
        print(json.dumps({"way": name, "seconds": round(statistics.median(values), 2), "runs": options.runs}))


if __name__ == "__main__":
    main()
