"""A metric, a judged result or a column of predictions that does not fit is found before the first step, without a trace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runtime.errors import ConfigurationError, EvaluationError, LockstepError
from runtime.session import train
from tests.observed import assert_bitwise_equal, configuration, observe
from tests.process_pool import ProcessPool

single = pytest.mark.single
CLASSES = {"task": "multiclass", "num_classes": 3}
VALIDATION = {"target": "tiny:points", "args": {"split": "validation", "size": 30}}


def config_of(folder: Path, metrics: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    return configuration(
        folder,
        data={"train": {"target": "tiny:points"}, "validation": VALIDATION},
        evaluation={"every": "1000 steps", "metrics": metrics or {}},
        **changes,
    )


def refused(config: dict[str, Any]) -> str:
    with pytest.raises(LockstepError) as caught:
        train(config)
    assert isinstance(caught.value, ConfigurationError), caught.value
    records = Path(config["output"]) / "metrics.jsonl"
    assert not records.exists() or '"event": "train"' not in records.read_text()
    return str(caught.value)


UNFIT = {
    "classes": {"target": "Accuracy", "args": {"task": "multiclass", "num_classes": 5}},
    "fewer": {"target": "F1Score", "args": {"task": "multiclass", "num_classes": 2}},
    "binary": {"target": "Accuracy", "args": {"task": "binary"}},
    "labels": {"target": "F1Score", "args": {"task": "multilabel", "num_labels": 3}},
    "regression": {"target": "MeanSquaredError"},
    "r2": {"target": "R2Score"},
}


@single
@pytest.mark.parametrize("name", UNFIT)
def test_a_metric_that_does_not_fit_is_named_before_the_first_step(tmp_path: Path, name: str) -> None:
    good = {"accuracy": {"target": "Accuracy", "args": CLASSES}}
    told = refused(config_of(tmp_path / "run", {**good, name: UNFIT[name]}))
    assert f"evaluation.metrics.{name}: metric '{name}'" in told
    assert "float64" in told
    assert "int64" in told


@single
def test_an_objective_that_cannot_say_what_metrics_see_is_named(tmp_path: Path) -> None:
    good = {"accuracy": {"target": "Accuracy", "args": CLASSES}}
    with pytest.raises(
        EvaluationError, match=r"NoInputs.metric_inputs raised TypeError.* output is \(\d+, 3\) float64"
    ):
        train(config_of(tmp_path / "run", good, objective="tiny_guarded:NoInputs"))


def told_by_ranks(folder: str) -> str:
    try:
        train(config_of(Path(folder), {"binary": UNFIT["binary"]}))
    except ConfigurationError as error:
        return str(error)
    return "nothing"


def test_all_ranks_tell_the_same(pool: ProcessPool, tmp_path: Path) -> None:
    told = pool.run(told_by_ranks, 2, str(tmp_path / "run"))
    assert "evaluation.metrics.binary" in told[0]
    assert len(set(told)) == 1


@single
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"checkpoint": {"best": [{"metric": "margni", "mode": "min"}]}}, "best.0.metric: no result .*'margni'.* margin"),
        ({"limit": {"steps": 2, "early_stopping": {"metric": "marg", "mode": "min"}}}, "early_stopping.metric: .*'marg'"),
        (
            {"schedule": {"target": "ReduceLROnPlateau", "monitor": "nothing"}},
            "schedule.monitor: no result is called 'nothing'",
        ),
        ({"checkpoint": {"best": [{"metric": "f1", "mode": "max"}]}}, "'f1' is not a single number; choose from: .*loss"),
        ({"limit": {"steps": 2, "early_stopping": {"metric": "f1", "mode": "max"}}}, "'f1' is not a single number"),
    ],
)  # fmt: skip
def test_a_result_that_is_judged_and_does_not_exist_is_named(tmp_path: Path, changes: Any, words: str) -> None:
    f1 = {"f1": {"target": "F1Score", "args": {**CLASSES, "average": "none"}}}
    config = config_of(tmp_path / "run", f1, **{"limit": {"steps": 2}, "objective": "tiny_guarded:Parted", **changes})
    with pytest.raises(ConfigurationError, match=words):
        train(config)


@single
def test_parts_of_a_users_objective_are_judged(tmp_path: Path) -> None:
    best = {"every": "1 step", "best": [{"metric": "margin", "mode": "min"}]}
    stopping = {"steps": 2, "early_stopping": {"metric": "margin", "mode": "min"}}
    config = config_of(tmp_path / "run", objective="tiny_guarded:Parted", checkpoint=best, limit=stopping)
    assert "margin" in train(config).results


@single
def test_a_monitored_result_that_is_missing_later_is_told(tmp_path: Path) -> None:
    schedule = {"target": "ReduceLROnPlateau", "monitor": "nothing"}
    config = config_of(
        tmp_path / "run", objective="tiny_guarded:Parted", schedule=schedule, limit={"steps": 2}, checks="off"
    )
    config["evaluation"]["every"] = "1 step"  # one that the end alone makes is no step of the schedule
    with pytest.raises(EvaluationError, match=r"schedule.monitor: 'nothing'"):
        train(config)


@single
@pytest.mark.parametrize(
    ("prediction", "words"),
    [
        ({"labels": ["a", "b"]}, "prediction.labels: 2 labels for 3 classes"),
        ({"columns": {"x": "probabilites"}}, "prediction.columns.x: .*'probabilites'.*'probabilities'"),
    ],
)
def test_predictions_are_tried(tmp_path: Path, prediction: Any, words: str) -> None:
    config = config_of(tmp_path / "run", prediction=prediction)
    with pytest.raises(ConfigurationError, match=words):
        train(config)
    with pytest.raises(ConfigurationError, match=words):  # with a training sample where nothing is evaluated
        train({**config, "data": {"train": config["data"]["train"]}, "evaluation": {}})


@single
def test_soft_targets_are_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fits = {"accuracy": {"target": "Accuracy", "args": {"task": "binary"}}, "mse": {"target": "MeanSquaredError"}}
    for split in ("train", "validation"):
        rows = "\n".join(f"{x},{0.1 if x < 0 else 0.9}" for x in range(-8, 8))
        (tmp_path / f"{split}.csv").write_text(f"x,y\n{rows}\n")
    args = {"target": "y", "task": "regression"}
    data = {
        s: {"target": "Table", "args": {**args, "path": str(tmp_path / f"{s}.csv")}} for s in ("train", "validation")
    }
    config = config_of(tmp_path / "run", fits, objective="BCEWithLogitsLoss", limit={"epochs": 60})
    result = train(
        {
            **config,
            "data": data,
            "model": {"target": "MLP", "args": {"in_features": 1, "hidden": [4], "out_features": 1}},
        }
    )
    assert result.results["accuracy"] == 1.0
    said = [line for line in capsys.readouterr().out.splitlines() if "are probabilities" in line]
    assert len(said) == 1
    assert "accuracy sees the likeliest class, mse sees the probabilities" in said[0]


@single
@pytest.mark.parametrize("model", ["tiny_guarded:Counting", "tiny:Mlp"])
def test_the_check_leaves_no_trace(tmp_path: Path, model: str) -> None:
    metrics = {"accuracy": {"target": "Accuracy", "args": CLASSES}}
    runs = [
        observe(
            config_of(tmp_path / checks, metrics, model=model, prediction={"columns": {"p": "class"}}, checks=checks)
        )
        for checks in ("on", "off")
    ]
    assert_bitwise_equal(*runs)
    assert runs[0]["losses"] == runs[1]["losses"]
    assert runs[0]["results"] == runs[1]["results"]


def streamed(folder: str, workers: int) -> Any:
    stream = {"target": "tiny_guarded:Once", "sharded_by": "runtime"}
    config = config_of(Path(folder), {"accuracy": {"target": "Accuracy", "args": CLASSES}})
    data = {"train": {"target": "tiny:points"}, "validation": stream, "loader": {"num_workers": workers}}
    return dict(train({**config, "data": data}).results)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_stream_that_can_be_read_once_loses_no_item(pool: ProcessPool, tmp_path: Path, world_size: int) -> None:
    for results in pool.run(streamed, world_size, str(tmp_path / "run"), 0):
        assert results["samples"] == 30.0
    mapped = train(config_of(tmp_path / "mapped", {"accuracy": {"target": "Accuracy", "args": CLASSES}})).results
    assert results["loss"] == pytest.approx(float(str(mapped["loss"])), rel=1e-9)
    assert json.loads((tmp_path / "run" / "outcome.json").read_text())["outcome"] == "finished"
