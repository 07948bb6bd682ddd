"""The run that is attacked, and what is promised of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).parent.parent.parent
TRAIN = ROOT / "runtime" / "train.py"
STEPS = 40
SAVED_EVERY, EVALUATED_EVERY, KEPT_BEST = 3, 4, 2
TOLERANCE = 1e-10
FENCE_SECONDS = 3.0  # of a damaged lock, which has to be watched; 30 s would only be longer
LAUNCHER_PATIENCE_SECONDS = 30.0  # torchrun's
GONE_SECONDS = (
    240.0  # in which every process has to be gone; a true launch takes a minute where cores are shared by many
)
SILENCE_SECONDS = 6.0
NOTICED_SECONDS = (
    30.0  # in which the others of a stopped rank have to be gone: a silence, their last words, and two busy cores
)
DISK_BYTES = 1 << 20


@dataclass(frozen=True)
class Setting:
    """One kind of run.

    Args:
        changes: sections that differ from those of :func:`configuration`.
        rollbacks: how many an undisturbed run has.
        any_size: whether numbers of processes may change in a campaign, with results equal to 1e-10.
        best: which losses count as the best. With ``max`` those of the first evaluations: who forgets them saves others.
        keep: newest checkpoints kept; all, where none that was saved without a reason may escape.
    """

    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    rollbacks: int = 1
    any_size: bool = True
    best: Literal["min", "max"] = "min"
    keep: int = 3

    @property
    def lowers_rate(self) -> bool:
        """Tell whether each rollback lowers the learning rate."""
        return "learning_rate_factor" in self.changes.get("divergence", {})


SETTINGS = (
    Setting(
        "swa",
        {
            "averaging": {"kind": "swa", "start": "22 steps", "every": "3 steps", "learning_rate": 0.02},
            "limit": {"early_stopping": {"metric": "loss", "mode": "min", "patience": 50}},
        },
    ),
    Setting(
        "half",  # the infinite sample is an overflow, which lowers the loss scale
        {
            "model": {"target": "tiny:Mlp", "args": {"dtype": "float32"}},
            "data": {"dtype": "float32"},
            "optimizer": {"target": "AdamW", "args": {"lr": 0.01}, "max_grad_norm": 1.0},
            "precision": "fp16",
            "averaging": {"kind": "ema", "decay": 0.9, "start": "16 steps", "every": "2 steps"},
        },
        rollbacks=0,
        any_size=False,
        best="max",
    ),
    Setting(
        "stream",
        {
            "data": {"train": {"target": "tiny_chaos:Stream", "sharded_by": "runtime"}},
            "averaging": {"kind": "ema", "decay": 0.9, "warmup": True, "start": "1 epoch"},
            "divergence": {"learning_rate_factor": 0.5, "spike": {"window": 6, "sigma": 1000.0, "policy": "rollback"}},
        },
        best="max",
        keep=STEPS,
    ),
)


def configuration(folder: Path, setting: Setting, *, num_workers: int = 0) -> dict[str, Any]:
    """Dropout, BatchNorm, random transforms, shuffling, momentum, averaging, warm-up and cosine, a rollback, the best two.

    One sample of the third epoch is infinite: whoever gets there goes back to the last checkpoint, and round its batch.
    """
    changes = {key: dict(value) if isinstance(value, dict) else value for key, value in setting.changes.items()}
    data, limit, divergence = (changes.pop(key, {}) for key in ("data", "limit", "divergence"))
    dtype = data.pop("dtype", "float64")
    train = {"target": "tiny_chaos:Points", "args": {}, "transform": "tiny_chaos:add_noise", **data.get("train", {})}
    train["args"] = {"pause_seconds": 0.0015, "dtype": dtype}
    return {
        "name": "chaos",
        "output": str(folder / "run"),
        "code": str(ROOT / "tests" / "project"),
        "model": {"target": "tiny:Mlp", "args": {}},
        "data": {
            "train": train,
            "validation": {
                "target": "tiny_chaos:Points",
                "args": {"split": "validation", "size": 31, "dtype": dtype},
            },
            "loader": {"num_workers": num_workers},
        },
        "batch": {"global_size": 18, "slots": 6},  # 1, 2 and 3 processes divide it
        "objective": "tiny_chaos:Named",
        "optimizer": {"target": "SGD", "args": {"lr": 0.1, "momentum": 0.9}, "max_grad_norm": 1.0},
        "schedule": {"target": "CosineAnnealingLR", "args": {"T_max": STEPS}, "warmup_steps": 5},
        "limit": {
            "steps": STEPS,
            "grace_seconds": 5.0,
            "stall_seconds": 20.0,
            "silence_seconds": SILENCE_SECONDS,
            **limit,
        },
        "divergence": {"non_finite": "rollback", "max_rollbacks": 100, **divergence},
        # Intervals that hardly coincide: which are the best must not depend on where a run was stopped.
        "evaluation": {"every": f"{EVALUATED_EVERY} steps"},
        "checkpoint": {
            "every": f"{SAVED_EVERY} steps",
            "keep": setting.keep,
            "best": [{"metric": "loss", "mode": setting.best, "keep": KEPT_BEST}],
        },
        "reporting": {"every": "1 step", "progress": False},
        "checks": "on" if setting.best == "min" else "off",  # which refuse to keep the largest losses
        **changes,
    }


class BrokenPromiseError(Exception):
    """The promise was broken."""
