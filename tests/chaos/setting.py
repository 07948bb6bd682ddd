"""The run that is attacked, and what is promised of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
TRAIN = ROOT / "runtime" / "train.py"
STEPS = 40
TOLERANCE = 1e-10
FENCE_SECONDS = 3.0  # of a damaged lock, which has to be watched; 30 s would only be longer
LAUNCHER_PATIENCE_SECONDS = 30.0  # torchrun's
GONE_SECONDS = 60.0  # in which every process has to be gone
SILENCE_SECONDS = 6.0
NOTICED_SECONDS = (
    30.0  # in which the others of a stopped rank have to be gone: a silence, their last words, and two busy cores
)
DISK_BYTES = 1 << 20


def configuration(folder: Path, *, num_workers: int = 0) -> dict[str, Any]:
    """Dropout, BatchNorm, random transforms, shuffling, momentum, averaging, warm-up and cosine, a rollback, the best two.

    One sample of the third epoch is infinite: whoever gets there goes back to the last checkpoint, and round its batch.
    """
    points = {"target": "tiny_chaos:Points", "args": {"pause_seconds": 0.0015}, "transform": "tiny_chaos:add_noise"}
    return {
        "name": "chaos",
        "output": str(folder / "run"),
        "code": str(ROOT / "tests" / "project"),
        "model": {"target": "tiny:Mlp", "args": {}},
        "data": {
            "train": points,
            "validation": {"target": "tiny_chaos:Points", "args": {"split": "validation", "size": 31}},
            "loader": {"num_workers": num_workers},
        },
        "batch": {"global_size": 18, "slots": 6},  # 1, 2 and 3 processes divide it
        "objective": "tiny_chaos:Named",
        "optimizer": {"target": "SGD", "args": {"lr": 0.1, "momentum": 0.9}, "max_grad_norm": 1.0},
        "schedule": {"target": "CosineAnnealingLR", "args": {"T_max": STEPS}, "warmup_steps": 5},
        "averaging": {"decay": 0.9},
        "limit": {"steps": STEPS, "grace_seconds": 5.0, "stall_seconds": 20.0, "silence_seconds": SILENCE_SECONDS},
        "divergence": {"non_finite": "rollback", "max_rollbacks": 100},
        # Intervals that hardly coincide: which are the best must not depend on where a run was stopped.
        "evaluation": {"every": "4 steps"},
        "checkpoint": {"every": "3 steps", "keep": 3, "best": [{"metric": "loss", "mode": "min", "keep": 2}]},
        "reporting": {"every": "1 step", "progress": False},
    }


class BrokenPromiseError(Exception):
    """The promise was broken."""
