"""Metrics of made-up predictions, measured on the ranks of a world; imported by its processes, so without scikit-learn."""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
import torch.distributed as dist

from runtime.build.builder import Builder
from runtime.config.file import load
from runtime.data.batches import slots_of_rank
from runtime.evaluation.metrics import MetricSet
from tests.observed import configuration

SIZE = 1003
MANY = {"task": "multiclass", "num_classes": 5}
TWO = {"task": "binary"}
LABELS = {"task": "multilabel", "num_labels": 4}
CPU = torch.device("cpu")


def metric(target: str, **args: Any) -> dict[str, Any]:
    return {"target": target, "args": args}


TASKS: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "many": (
        "CrossEntropyLoss",
        {
            "accuracy": metric("Accuracy", **MANY, average="micro"),
            "top2": metric("Accuracy", **MANY, average="micro", top_k=2),
            "balanced": metric("Accuracy", **MANY, average="macro"),
            "f1": metric("F1Score", **MANY, average="macro"),
            "f1_weighted": metric("F1Score", **MANY, average="weighted"),
            "f1_each": metric("F1Score", **MANY, average="none"),
            "fbeta": metric("FBetaScore", **MANY, average="macro", beta=2.0),
            "precision": metric("Precision", **MANY, average="macro"),
            "recall": metric("Recall", **MANY, average="macro"),
            "specificity": metric("Specificity", **MANY, average="macro"),
            "jaccard": metric("JaccardIndex", **MANY, average="macro"),
            "auroc": metric("AUROC", **MANY),
            "auroc_binned": metric("AUROC", **MANY, thresholds=2001),
            "average_precision": metric("AveragePrecision", **MANY),
            "confusion": metric("ConfusionMatrix", **MANY),
            "shares": metric("ConfusionMatrix", **MANY, normalize="true"),
            "kappa": metric("CohenKappa", **MANY),
            "kappa_quadratic": metric("CohenKappa", **MANY, weights="quadratic"),
            "mcc": metric("MatthewsCorrCoef", **MANY),
            "calibration": metric("CalibrationError", **MANY, n_bins=10),
            "roc": metric("ROC", **MANY),
            "wrapped": metric("ClasswiseWrapper", metric=metric("torchmetrics:Recall", **MANY, average="none")),
        },
    ),
    "two": (
        "BCEWithLogitsLoss",
        {
            "accuracy": metric("Accuracy", **TWO),
            "f1": metric("F1Score", **TWO),
            "specificity": metric("BinarySpecificity"),
            "auroc": metric("AUROC", **TWO),
            "average_precision": metric("AveragePrecision", **TWO),
            "confusion": metric("ConfusionMatrix", **TWO),
            "mcc": metric("MatthewsCorrCoef", **TWO),
            "calibration": metric("CalibrationError", **TWO, n_bins=10, norm="max"),
            "roc": metric("ROC", **TWO),
            "curve": metric("PrecisionRecallCurve", **TWO),
            "mrr": metric("RetrievalMRR"),
            "map": metric("RetrievalMAP"),
            "ndcg": metric("RetrievalNormalizedDCG"),
            "ndcg5": metric("RetrievalNormalizedDCG", top_k=5),
            "precision5": metric("RetrievalPrecision", top_k=5),
            "recall5": metric("RetrievalRecall", top_k=5),
            "hit2": metric("RetrievalHitRate", top_k=2),
        },
    ),
    "labels": (
        "BCEWithLogitsLoss",
        {
            "f1": metric("F1Score", **LABELS, average="macro"),
            "auroc": metric("AUROC", **LABELS),
            "ranking": metric("MultilabelRankingAveragePrecision", num_labels=4),
            "coverage": metric("MultilabelCoverageError", num_labels=4),
        },
    ),
    "value": (
        "MSELoss",
        {
            "mae": metric("MeanAbsoluteError"),
            "mse": metric("MeanSquaredError"),
            "rmse": metric("MeanSquaredError", squared=False),
            "msle": metric("MeanSquaredLogError"),
            "mape": metric("MeanAbsolutePercentageError"),
            "r2": metric("R2Score"),
            "explained": metric("ExplainedVariance"),
            "pearson": metric("PearsonCorrCoef"),
            "spearman": metric("SpearmanCorrCoef"),
            "mean": metric("MeanMetric"),
            "largest": metric("MaxMetric"),
        },
    ),
    "tokens": (
        "NextTokenLoss",
        {"perplexity": metric("Perplexity"), "accuracy": metric("Accuracy", task="multiclass", num_classes=11)},
    ),
}


def data(task: str, size: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Output and batch. Accuracy falls along the data, so that a mean over batches or ranks is another one."""
    generator = torch.Generator().manual_seed(size + len(task))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(size, *shape, generator=generator, dtype=torch.float64)

    certainty = torch.linspace(3, 0, size, dtype=torch.float64)
    group = torch.randint(0, 60 if size > 10 else 1, (size,), generator=generator) * 10**14 - 3
    if task == "many":
        target = torch.randint(0, 9, (size,), generator=generator).clamp(max=4)
        output = normal(5) + torch.nn.functional.one_hot(target, 5) * certainty[:, None]
    elif task == "tokens":
        target = torch.randint(0, 11, (size, 7), generator=generator)
        output = normal(7, 11) + torch.nn.functional.one_hot(target, 11) * certainty[:, None, None]
        target[torch.rand(size, 7, generator=generator) < torch.linspace(0, 1, size)[:, None]] = -100
        target[0, 0] = 4
    elif task == "value":
        target = normal().abs() + 0.1
        output = (target + normal() * (4 - certainty) / 4).abs()
    else:
        shape = (4,) if task == "labels" else ()
        target = (normal(*shape) > 0.3).double()
        target[:1] = 1
        output = normal(*shape) + (target - 0.5) * (certainty[:, None] if shape else certainty)
    return output, {"inputs": output, "target": target, "group": group}


def load_task(task: str, **metrics: dict[str, Any]) -> Any:
    objective, of_task = TASKS[task]
    section = {"metrics": metrics or of_task}
    return load(
        configuration(
            "unused",
            data={"train": "tiny:points", "fields": {"group": "group"}},
            objective=objective,
            evaluation=section,
        )
    )


def measure(sizes: tuple[int, ...]) -> dict[int, dict[str, dict[str, Any]]]:
    """What every task's metrics are, for data of several sizes, on this rank of a world, which sees a share of the batches."""
    world_size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if world_size > 1:
        dist.init_process_group("gloo")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of two samples most are undefined
            return {size: {task: _measured(task, size, world_size, rank) for task in TASKS} for size in sizes}
    finally:
        if world_size > 1:
            dist.barrier()
            dist.destroy_process_group()


def _measured(task: str, size: int, world_size: int, rank: int) -> dict[str, Any]:
    loaded = load_task(task)
    objective, metrics = Builder(loaded).objective(), MetricSet(Builder(loaded).metrics(), CPU)
    output, batch = data(task, size)
    micro_size = 96 if size > 10 else 1
    for number in slots_of_rank(-(-size // micro_size), world_size, rank):
        ids = slice(number * micro_size, (number + 1) * micro_size)
        metrics.update(objective, output[ids], {key: value[ids] for key, value in batch.items()})
    return metrics.compute()
