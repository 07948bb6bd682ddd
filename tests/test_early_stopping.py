"""A run that no longer improves ends: at the same evaluation on any number of processes, however often it was interrupted."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from runtime.config.file import load
from runtime.config.sections import EarlyStoppingSection as Section
from runtime.errors import ConfigurationError, EvaluationError
from runtime.training.early_stopping import EarlyStopping
from tests.observed import assert_bitwise_equal, configuration, largest_difference, observe
from tests.process_pool import ProcessPool
from tests.test_resumption import observe_stopping

WATCHED: dict[str, Any] = {"metric": "loss", "mode": "min", "patience": 2, "min_delta": 0.01}


@pytest.mark.single
@pytest.mark.parametrize(
    ("section", "values", "ends_after", "best_at"),
    [
        ({"mode": "min", "patience": 2}, [3, 2, 2, 2.5, 1], 4, 2),
        ({"mode": "max", "patience": 2}, [3, 2, 4, 4, 1], 5, 3),
        ({"mode": "max", "patience": 1}, [1, 2, 3, 4, 5], None, 5),
        ({"mode": "min", "patience": 3, "min_delta": 0.5}, [3, 2.75, 2.25, 2, 1.75, 1.75], 6, 3),
        ({"mode": "min", "patience": 2}, [math.nan, 1, math.nan, math.inf], 4, 2),
        ({"mode": "max", "patience": 2}, [math.nan, math.nan], 2, 0),
    ],
)
def test_it_waits_for_patience_evaluations_without_an_improvement(
    section: dict[str, Any], values: list[float], ends_after: int | None, best_at: int
) -> None:
    stopping = EarlyStopping(Section(metric="m", **section))
    ended = None
    for step, value in enumerate(values, start=1):
        stopping.after_evaluation({"m": float(value)}, step)
        if stopping.exhausted:
            ended = step
            break
    assert (ended, stopping.best_step) == (ends_after, best_at)


@pytest.mark.single
def test_another_result_is_watched_from_the_beginning() -> None:
    first = EarlyStopping(Section(metric="loss", mode="min"))
    first.after_evaluation({"loss": 1.0}, 5)
    same, other = (EarlyStopping(Section(metric=m, mode="min", patience=9)) for m in ("loss", "error"))
    same.load_state_dict(json.loads(json.dumps(first.state_dict())))
    other.load_state_dict(first.state_dict())
    assert (same.best, same.best_step, other.best) == (1.0, 5, None)


@pytest.mark.single
@pytest.mark.parametrize(
    ("results", "words"), [({"loss": 1.0}, "'m' is not a result"), ({"m": [1.0]}, "'m' is not a single number")]
)
def test_a_result_that_is_no_number_is_named(results: Any, words: str) -> None:
    with pytest.raises(EvaluationError, match=words):
        EarlyStopping(Section(metric="m", mode="max")).after_evaluation(results, 1)


def stopping_early(folder: Path, **early_stopping: Any) -> dict[str, Any]:
    """Evaluates every 3 of 60 steps; stops, goes on for a while with more patience, and would not reach the limit."""
    return configuration(
        folder,
        data={
            "train": {"target": "tiny:points"},
            "validation": {"target": "tiny:points", "args": {"split": "validation", "size": 101}},
        },
        optimizer={"target": "SGD", "args": {"lr": 0.6, "momentum": 0.9}},
        evaluation={"every": "3 steps", "micro_size": 16},
        limit={"steps": 60, "early_stopping": {**WATCHED, **early_stopping}},
    )


def evaluations(folder: Path) -> list[tuple[int, float]]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r["loss"]) for r in records if r["event"] == "evaluation"]


def messages(folder: Path) -> list[str]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [r["text"] for r in records if r["event"] == "message"]


def end_by_hand(losses: list[tuple[int, float]], patience: int) -> tuple[int, int]:
    """Return the last step and the best one."""
    best, best_step, waited = math.inf, 0, 0
    for step, loss in losses:
        if loss < best - WATCHED["min_delta"]:
            best, best_step, waited = loss, step, 0
        else:
            waited += 1
        if waited == patience:
            return step, best_step
    raise AssertionError("it would not have stopped")


def test_it_ends_alike_on_two_processes_says_why_and_more_patience_continues_it(
    pool: ProcessPool, tmp_path: Path
) -> None:
    alone = pool.run(observe, 1, stopping_early(tmp_path / "alone"))[0]
    ranks = pool.run(observe, 2, stopping_early(tmp_path / "two"))
    patient = pool.run(observe, 1, stopping_early(tmp_path / "patient", patience=4))[0]
    losses = evaluations(tmp_path / "patient")
    step, best = end_by_hand(losses, patience=2)
    assert 6 < step < end_by_hand(losses, patience=4)[0] == patient["step"] < 60
    for run in (alone, *ranks):
        assert (run["outcome"], run["step"]) == ("finished", step)
        assert largest_difference(run, alone) < 1e-10
    outcome = json.loads((tmp_path / "two" / "outcome.json").read_text())
    assert (outcome["outcome"], outcome["exit_code"]) == ("finished", 0)
    why = (
        f"stopped early, after step {step}: loss has not improved by more than 0.01 in 2 evaluations; the best value is"
    )
    assert outcome["message"].startswith(why)
    assert outcome["message"].endswith(f"after step {best}")
    kept = json.loads((tmp_path / "alone" / "checkpoints" / "best.json").read_text())["loss"]
    assert [entry["step"] for entry in kept] == [min(losses[: step // 3], key=lambda entry: entry[1])[0]]
    assert (tmp_path / "alone" / "checkpoints" / kept[0]["checkpoint"]).is_dir()

    again = pool.run(observe, 1, stopping_early(tmp_path / "alone"))[0]
    assert (again["outcome"], again["step"]) == ("finished", step)
    assert any(f"This run is finished: {why}" in text and "patience" in text for text in messages(tmp_path / "alone"))
    longer = pool.run(observe, 1, stopping_early(tmp_path / "alone", patience=4))[0]
    assert evaluations(tmp_path / "alone") == losses
    assert_bitwise_equal(longer, patient)


@pytest.mark.parametrize("world_size", [2])
def test_an_interrupted_run_ends_at_the_same_step_bit_for_bit(
    pool: ProcessPool, tmp_path: Path, world_size: int
) -> None:
    whole = pool.run(observe, world_size, stopping_early(tmp_path / "whole"))[0]
    config = stopping_early(tmp_path / "cut")
    last = whole["step"]
    # Between evaluations; in the middle of one that counts, and after it; in the middle of the one that ends the run.
    for after, left_at in ((2, 2), (last - 2, last - 3), (last - 1, last - 1), (last + 1, last)):
        stopped = pool.run(observe_stopping, world_size, config, after)[0]
        assert (stopped["outcome"], stopped["step"]) == ("stopped", left_at)
    resumed = pool.run(observe, world_size, config)[0]
    assert (resumed["outcome"], resumed["step"]) == ("finished", whole["step"])
    assert_bitwise_equal(resumed, whole)
    assert evaluations(tmp_path / "cut") == evaluations(tmp_path / "whole")


@pytest.mark.single
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": {"train": "tiny:points"}}, "limit.early_stopping: early stopping needs data.validation"),
        (
            {"limit": {"steps": 1, "early_stopping": {"metric": "acuracy", "mode": "max"}}},
            "limit.early_stopping.metric: there is no result 'acuracy'",
        ),
        ({"limit": {"steps": 1, "early_stopping": {"metric": "loss"}}}, "limit.early_stopping.mode"),
        (
            {
                "limit": {"steps": 1, "early_stopping": {"metric": "loss", "mode": "min"}},
                "checkpoint": {"best": [{"metric": "loss", "mode": "max"}]},
            },
            "checkpoint.best.0.metric: 'loss' is given twice",
        ),
    ],
)
def test_what_cannot_be_watched_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        load({**stopping_early(tmp_path), **changes})
