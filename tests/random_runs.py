"""Configurations drawn at random from what a run can be made of, and the part of a record that must not depend on the ranks."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

LOSSES: dict[str, list[dict[str, Any]]] = {
    "classes": [
        {"target": "CrossEntropyLoss"},
        {"target": "CrossEntropyLoss", "args": {"label_smoothing": 0.1}},
        {"target": "CrossEntropyLoss", "args": {"weight": [0.5, 1.25, 3.0]}},
        {"target": "MultiMarginLoss"},
    ],
    "labels": [{"target": "BCEWithLogitsLoss"}, {"target": "MultiLabelSoftMarginLoss"}],
    "numbers": [{"target": "MSELoss"}, {"target": "L1Loss"}, {"target": "SmoothL1Loss"}, {"target": "HuberLoss"}],
    "words": [{"target": "NextTokenLoss"}],
}
METRICS: dict[str, dict[str, Any]] = {
    "classes": {
        "accuracy": {"target": "MulticlassAccuracy", "args": {"num_classes": 3}},
        "hinge": {"target": "MulticlassHingeLoss", "args": {"num_classes": 3}},
        "auroc": {"target": "MulticlassAUROC", "args": {"num_classes": 3}},
    },
    "labels": {"f1": {"target": "MultilabelF1Score", "args": {"num_labels": 3}}},
    "numbers": {
        "error": {"target": "MeanAbsoluteError"},
        "r2": {"target": "R2Score"},
        "pearson": {"target": "PearsonCorrCoef", "args": {"num_outputs": 3}},
    },
    "words": {},
}
OPTIMIZERS: list[dict[str, Any]] = [
    {"target": "SGD", "args": {"lr": 0.05}},
    {"target": "SGD", "args": {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}},
    {"target": "Adam", "args": {"lr": 0.01}},
    {"target": "AdamW", "args": {"lr": 0.01, "amsgrad": True}},
    {"target": "AdamW", "args": {"lr": 0.01, "fused": False}},
    {"target": "NAdam", "args": {"lr": 0.01}},
    {"target": "RAdam", "args": {"lr": 0.01}},
    {"target": "Adagrad", "args": {"lr": 0.05}},
    {"target": "Adadelta", "args": {"lr": 1.0}},
    {"target": "Adamax", "args": {"lr": 0.01}},
    {"target": "RMSprop", "args": {"lr": 0.01, "momentum": 0.5, "centered": True}},
    {"target": "ASGD", "args": {"lr": 0.05}},
    {"target": "Rprop", "args": {"lr": 0.01}},
    {"target": "Adafactor", "args": {"lr": 0.01}},
]
SCHEDULES: list[dict[str, Any] | None] = [
    None,
    {"target": "CosineAnnealingLR", "warmup_steps": 3},
    {"target": "StepLR", "args": {"step_size": 4, "gamma": 0.5}},
    {"target": "ReduceLROnPlateau", "args": {"patience": 0}, "monitor": "loss"},
]
AVERAGES: list[dict[str, Any] | None] = [
    None,
    None,
    {"kind": "ema", "decay": 0.9, "warmup": True},
    {"kind": "swa", "start": "4 steps", "every": "2 steps"},
]
_OF_THE_MACHINE = ("time", "samples_per_second", "tokens_per_second", "data_share", "slowest", "peak_memory")


def random_run(seed: int, folder: Path) -> dict[str, Any]:
    """A run of 12 steps with ``determinism: exact``, saved every 4 steps."""
    draw = random.Random(seed)
    kind = draw.choice(["classes", "classes", "labels", "numbers", "words"])
    model: dict[str, Any] = {"target": "tiny_exact:Words"}
    train: dict[str, Any] = {"target": "tiny:tokens", "args": {"size": 70}}
    validation = dict(train)
    if kind != "words":
        model = {
            "target": "tiny_exact:Normed",
            "args": {
                "batch_norm": draw.random() < 0.6,
                "dropout": draw.choice([0.0, 0.2]),
                "shared": draw.random() < 0.3,
                "sometimes": draw.random() < 0.3,
            },
        }
        streams = draw.random() < 0.25
        target = "tiny_exact:Stream" if streams else "tiny_exact:samples"
        train = {"target": target, "args": {"kind": kind}} | ({"sharded_by": "runtime"} if streams else {})
        validation = {"target": "tiny_exact:samples", "args": {"kind": kind, "size": 53, "seed": 1}}
    streamed = "sharded_by" in train
    schedule = draw.choice(SCHEDULES)
    averaging = draw.choice(AVERAGES[:3] if streamed else AVERAGES)  # SWA's statistics need an epoch
    clipping = draw.choice([{}, {"max_grad_norm": 0.5}, {"max_grad_value": 0.05}])
    data: dict[str, Any] = {"train": train, "validation": validation}
    if draw.random() < 0.15:
        data["loader"] = {"num_workers": 2}
    return {
        "name": "run",
        "output": str(folder),
        "code": str(Path(__file__).parent / "project"),
        "determinism": "exact",
        "checks": "off",
        "seed": seed,
        "model": model,
        "data": data,
        "batch": {"global_size": draw.choice([16, 20, 24]), "slots": draw.randint(2, 6)},
        "objective": draw.choice(LOSSES[kind]),
        "optimizer": {**draw.choice(OPTIMIZERS), **clipping},
        "limit": {"steps": 12},
        "precision": draw.choice(["fp32", "fp32", "fp32", "bf16", "fp16"]),
        "checkpoint": {"every": "4 steps", "keep": 9},
        "evaluation": {
            "every": "5 steps",
            "micro_size": 7,
            "metrics": METRICS[kind],
            "metrics_on_train": bool(METRICS[kind]),
        },
        "reporting": {"every": "3 steps", "progress": False},
        **({"schedule": schedule} if schedule is not None else {}),
        **({"averaging": averaging} if averaging is not None else {}),
    }


def can_be_sharded(run: dict[str, Any]) -> bool:
    """Whether the run's optimizer treats all elements alike."""
    return run["optimizer"]["target"] != "Adafactor"


def sharded(run: dict[str, Any], *, replicas: int = 1) -> dict[str, Any]:
    """The same run with FSDP2; in blocks if each is called once in every forward pass, and returns no view."""
    args = run["model"].get("args", {})
    together = run["model"]["target"] == "tiny_exact:Words" or args.get("shared") or args.get("sometimes")
    fsdp = {"wrap": [] if together else ["Linear"], "replicas": replicas}
    return {**run, "strategy": {"kind": "fsdp", "fsdp": fsdp}}


def record_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's record, without what is the machine's, and without starts and messages."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if not key.startswith(_OF_THE_MACHINE)}
        for line in lines
        if line["event"] in ("train", "evaluation", "checkpoint")
    ]
