"""Evaluation is exact in any world size: scikit-learn's values on the whole set, every sample once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn import metrics as sk

from tests.observed import configuration, observe
from tests.process_pool import ProcessPool
from tests.project.tiny import Mlp, points

SIZE = 1003
CLASSES = {"task": "multiclass", "num_classes": 3}


def evaluated(folder: Path, size: int, metrics: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return configuration(
        folder,
        data={
            "train": {"target": "tiny:points", "args": {"size": 64}},
            "validation": {"target": "tiny:points", "args": {"split": "validation", "size": size}},
        },
        evaluation={"every": "1 epoch", "micro_size": 96, "metrics": metrics},
        limit={"steps": 2},
        **changes,
    )


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.single), 2, 3])
def test_1003_samples_give_scikit_learns_values(pool: ProcessPool, tmp_path: Path, world_size: int) -> None:
    config = evaluated(
        tmp_path,
        SIZE,
        {
            "accuracy": {"target": "Accuracy", "args": CLASSES},
            "f1": {"target": "F1Score", "args": {**CLASSES, "average": "macro"}},
            "auroc": {"target": "AUROC", "args": CLASSES},
            "confusion": {"target": "ConfusionMatrix", "args": CLASSES},
        },
    )
    ranks = pool.run(observe, world_size, config)
    results = ranks[0]["results"]
    assert all(other["results"] == results for other in ranks)

    model = Mlp().eval()
    model.load_state_dict({name: torch.from_numpy(value) for name, value in ranks[0]["weights"].items()})
    inputs, target = points("validation", SIZE).tensors
    with torch.no_grad():
        probabilities = model(inputs).softmax(-1).numpy()
    predicted, truth = probabilities.argmax(-1), target.numpy()
    assert results["samples"] == SIZE
    assert results["loss"] == pytest.approx(sk.log_loss(truth, probabilities), rel=1e-6)
    assert results["accuracy"] == pytest.approx(sk.accuracy_score(truth, predicted), rel=1e-6)
    assert results["f1"] == pytest.approx(sk.f1_score(truth, predicted, average="macro"), rel=1e-6)
    assert results["auroc"] == pytest.approx(sk.roc_auc_score(truth, probabilities, multi_class="ovr"), rel=1e-6)
    assert np.array_equal(results["confusion"], sk.confusion_matrix(truth, predicted))


@pytest.mark.parametrize("size", [1, 2])
def test_fewer_samples_than_ranks_work_with_every_kind_of_state(pool: ProcessPool, tmp_path: Path, size: int) -> None:
    config = evaluated(
        tmp_path,
        size,
        {
            "accuracy": {"target": "Accuracy", "args": CLASSES},  # sums
            "average_precision": {"target": "AveragePrecision", "args": {**CLASSES, "thresholds": 5}},
            "auroc": {"target": "AUROC", "args": CLASSES},  # concatenated lists
            "kappa": {"target": "CohenKappa", "args": CLASSES},
            "mean": {"target": "tiny_metrics:MeanOfMaximum", "args": {}},  # means over ranks
        },
        code=str(Path(__file__).parent / "project"),
    )
    ranks = pool.run(observe_quietly, 3, config)
    alone = pool.run(observe_quietly, 1, {**config, "output": f"{tmp_path}/alone"})[0]
    assert ranks[0]["results"]["samples"] == size
    assert ranks[0]["results"].keys() == alone["results"].keys()
    for name, value in alone["results"].items():
        assert ranks[2]["results"][name] == pytest.approx(value, rel=1e-9, nan_ok=True), name


def observe_quietly(config: dict[str, Any]) -> dict[str, Any]:
    """torchmetrics warns that one sample lacks positives or negatives of a class; that is what is tested."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return observe(config)


def test_regression_metrics_match_scikit_learn(pool: ProcessPool, tmp_path: Path) -> None:
    config = configuration(
        tmp_path,
        model={"target": "tiny_metrics:Line", "args": {}},
        data={
            "train": {"target": "tiny_metrics:line", "args": {"size": 64}},
            "validation": {"target": "tiny_metrics:line", "args": {"size": 101}},
        },
        objective="MSELoss",
        evaluation={
            "micro_size": 10,
            "metrics": {
                "mae": "MeanAbsoluteError",
                "rmse": {"target": "MeanSquaredError", "args": {"squared": False}},
                "r2": "R2Score",
                "pearson": "PearsonCorrCoef",
            },
        },
        limit={"epochs": 1},
    )
    ranks = pool.run(observe, 2, config)
    results = ranks[0]["results"]
    from tests.project.tiny_metrics import Line, line

    model = Line()
    model.load_state_dict({name: torch.from_numpy(value) for name, value in ranks[0]["weights"].items()})
    inputs, target = line(101).tensors
    with torch.no_grad():
        predicted = model(inputs).numpy()
    truth = target.numpy()
    assert results["loss"] == pytest.approx(sk.mean_squared_error(truth, predicted), rel=1e-9)
    assert results["mae"] == pytest.approx(sk.mean_absolute_error(truth, predicted), rel=1e-9)
    assert results["rmse"] == pytest.approx(sk.root_mean_squared_error(truth, predicted), rel=1e-9)
    assert results["r2"] == pytest.approx(sk.r2_score(truth, predicted), rel=1e-9)
    assert results["pearson"] == pytest.approx(np.corrcoef(truth, predicted)[0, 1], rel=1e-6)


def test_masked_tokens_are_in_no_metric_and_in_no_loss(pool: ProcessPool, tmp_path: Path) -> None:
    config = configuration(
        tmp_path,
        model="tiny:Tagger",
        data={"train": {"target": "tiny:tokens"}, "validation": {"target": "tiny:tokens", "args": {"size": 33}}},
        objective="NextTokenLoss",
        evaluation={
            "micro_size": 5,
            "metrics": {
                "accuracy": {"target": "Accuracy", "args": {"task": "multiclass", "num_classes": 7, "average": "micro"}}
            },
        },
        limit={"steps": 1},
    )
    ranks = pool.run(observe, 3, config)
    from tests.project.tiny import Tagger, tokens

    model = Tagger()
    model.load_state_dict({name: torch.from_numpy(value) for name, value in ranks[0]["weights"].items()})
    inputs, target = tokens(33).tensors
    with torch.no_grad():
        logits = model(inputs)
    counted = target != -100
    expected = (logits.argmax(-1) == target)[counted].double().mean().item()
    assert ranks[0]["results"]["accuracy"] == pytest.approx(expected, rel=1e-9)
    loss = sk.log_loss(target[counted].numpy(), logits.softmax(-1)[counted].numpy(), labels=range(7))
    assert ranks[0]["results"]["loss"] == pytest.approx(loss, rel=1e-9)


def test_metrics_on_training_batches_see_each_real_sample_once(pool: ProcessPool, tmp_path: Path) -> None:
    config = evaluated(tmp_path, 8, {"seen": {"target": "tiny_metrics:Seen"}}, batch={"global_size": 20, "slots": 7})
    config["model"]["args"] = {"batch_norm": False}  # some slots have one sample
    config["evaluation"]["metrics_on_train"] = True
    config["limit"] = {"epochs": 1}
    config["reporting"]["every"] = "1 epoch"
    pool.run(observe, 3, config)
    import json

    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["seen"] for r in records if r["event"] == "train"] == [64.0]


@pytest.mark.single
def test_averaged_weights_are_evaluated_and_raw_ones_trained(pool: ProcessPool, tmp_path: Path) -> None:
    config = evaluated(tmp_path / "raw", 50, {}, averaging={"decay": 0.9, "evaluate": False})
    raw = pool.run(observe, 1, config)[0]
    averaged = pool.run(observe, 1, {**config, "output": f"{tmp_path}/averaged"}, "averaging.evaluate=true")[0]
    for name, value in raw["weights"].items():
        assert value.tobytes() == averaged["weights"][name].tobytes(), name
    assert raw["results"]["loss"] != averaged["results"]["loss"]
