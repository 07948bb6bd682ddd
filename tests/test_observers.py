"""Observers see each step once, on every rank, as plain values; they change nothing, and their mistakes are told as theirs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import lockstep
from lockstep import StepReport, StopReason
from tests.chaos.nursery import Nursery
from tests.forked import Forked
from tests.observed import assert_bitwise_equal, configuration, observe
from tests.process_pool import ProcessPool
from tests.test_failure import endless

single = pytest.mark.single
POINTS = {"target": "tiny:points", "args": {"size": 40}}
VALIDATION = {"target": "tiny:points", "args": {"split": "validation"}}


def reported(config: dict[str, Any], *overrides: str) -> list[StepReport]:
    """Train, and return the reports of this rank."""
    reports: list[StepReport] = []
    lockstep.train(config, *overrides, observers=[reports.append])
    return reports


def records(folder: Path, event: str) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["event"] == event]


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=single), 2])
def test_each_step_is_reported_once_with_what_is_known_of_it(
    pool: ProcessPool, tmp_path: Path, world_size: int
) -> None:
    """40 samples in batches of 16, so 16, 16 and 8 in each epoch; the rate falls by 0.1 with each step."""
    config = configuration(
        tmp_path,
        data={"train": POINTS, "validation": VALIDATION},
        limit={"epochs": 2},
        optimizer={"target": "SGD", "args": {"lr": 0.6}},
        schedule={"target": "LinearLR", "args": {"start_factor": 1.0, "end_factor": 0.0, "total_iters": 6}},
        reporting={"every": "2 steps", "progress": False},
        evaluation={"every": "1 epoch"},
    )
    ranks = pool.run(reported, world_size, config)
    for rank, reports in enumerate(ranks):
        assert [report.rank for report in reports] == [rank] * 6
        assert [(report.step, report.epoch, report.batch) for report in reports] == [
            (1, 1, 1), (2, 1, 2), (3, 1, 3), (4, 2, 1), (5, 2, 2), (6, 2, 3),
        ]  # fmt: skip
        assert [(report.samples, report.weight, report.epoch_ends) for report in reports] == [
            (16, 16.0, False), (16, 16.0, False), (8, 8.0, True),
        ] * 2  # fmt: skip
        assert [rate for report in reports for rate in report.learning_rates] == pytest.approx(
            [0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
        )
        assert all(report.applied is True and report.attempt == 0 for report in reports)
        assert [report.stop_reason for report in reports] == [None] * 5 + [StopReason.EPOCH_LIMIT]
        told = {record["step"]: (record["loss"], record["grad_norm"]) for record in records(tmp_path, "train")}
        assert {report.step: (report.loss, report.grad_norm) for report in reports if report.figures} == told
        assert [report.loss is None for report in reports] == [True, False] * 3
        found = {record["step"]: record["loss"] for record in records(tmp_path, "evaluation")}
        assert {report.step: report.results["loss"] for report in reports if report.results} == found
        assert list(found) == [3, 6]


@single
def test_the_yamls_observers_come_before_those_of_the_call(tmp_path: Path) -> None:
    notes = [{"target": "tiny_observers:Notes", "args": {"folder": str(tmp_path), "name": n}} for n in ("a", "b")]
    config = configuration(tmp_path / "run", limit={"steps": 2})
    config["reporting"]["observers"] = [*notes, "tiny_observers:meddling"]

    def last(report: StepReport) -> None:
        with (tmp_path / "rank-0").open("a") as file:
            file.write(f"c {report.step}\n")

    lockstep.train(config, observers=[last])
    assert (tmp_path / "rank-0").read_text().split("\n")[:-1] == ["a 1", "b 1", "c 1", "a 2", "b 2", "c 2"]


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=single), 2])
def test_an_observer_changes_nothing(pool: ProcessPool, tmp_path: Path, world_size: int) -> None:
    """Dropout, BatchNorm, an evaluation that picks the best, and a schedule that follows it."""
    changes = {
        "model": {"target": "tiny:Mlp", "args": {"dropout": 0.2}},
        "data": {"train": {"target": "tiny:points"}, "validation": {"target": "tiny:points", "args": {"split": "v"}}},
        "schedule": {"target": "ReduceLROnPlateau", "args": {"patience": 0}, "monitor": "loss"},
        "evaluation": {"every": "2 steps"},
    }
    runs = {}
    for name, observers in (("without", []), ("with", ["tiny_observers:meddling"])):
        reporting = {"every": "2 steps", "progress": False, "observers": observers}
        config = configuration(tmp_path / name, **changes, reporting=reporting)
        runs[name] = pool.run(observe, world_size, config)[0]
    assert_bitwise_equal(runs["without"], runs["with"])
    for what in ("losses", "norms", "results"):
        assert runs["without"][what] == runs["with"][what]


@single
def test_what_an_observer_raises_is_told_as_its_own(tmp_path: Path) -> None:
    def careless(report: StepReport) -> None:
        if report.step == 3:
            raise ZeroDivisionError("by nothing")

    line = careless.__code__.co_firstlineno + 2
    with pytest.raises(lockstep.errors.ObserverError) as told:
        lockstep.train(configuration(tmp_path), observers=[careless])
    assert "test_observers:test_what_an_observer_raises" in str(told.value)
    assert f"careless raised ZeroDivisionError: by nothing (at {__file__}:{line}), after step 3" in str(told.value)


def test_an_observer_that_raises_on_one_rank_leaves_no_rank_hanging(nursery: Nursery, tmp_path: Path) -> None:
    config = endless(tmp_path, limit={"steps": 1_000_000, "silence_seconds": 300})
    config["reporting"]["observers"] = ["tiny_observers:failing"]
    with Forked(nursery, tmp_path, config, 2) as run:
        run.wait_for_end()  # in less than a minute, so no silence was waited for
        assert "lockstep: rank 1: the observer tiny_observers:failing raised KeyError: 'no such column'" in run.told()
        assert "tiny_observers.py:" in run.told() and "after step 2" in run.told()
        outcome = run.outcome()
    assert (outcome["outcome"], outcome["exit_code"]) == ("failed", 1)


@single
@pytest.mark.parametrize(
    ("observers", "words"),
    [
        (["tiny_observers:missing"], ["reporting.observers.0", "missing"]),
        (["tiny_observers:meddling", {"target": "tiny_observers:Notes", "args": {"nme": 1}}], ["observers.1", "nme"]),
    ],
)
def test_a_wrong_observer_in_the_yaml_is_refused_before_anything_is_built(
    tmp_path: Path, observers: list[Any], words: Sequence[str]
) -> None:
    config = configuration(tmp_path / "run")
    config["reporting"]["observers"] = observers
    with pytest.raises(lockstep.errors.ConfigurationError) as told:
        lockstep.train(config)
    assert all(word in str(told.value) for word in words)
    assert not (tmp_path / "run").exists()


@single
def test_what_cannot_be_called_is_no_observer(tmp_path: Path) -> None:
    with pytest.raises(lockstep.errors.ConfigurationError, match=r"3 cannot be called with a StepReport"):
        lockstep.train(configuration(tmp_path), observers=[3])  # type: ignore[list-item]


@single
def test_a_skipped_step_is_reported_as_not_applied(tmp_path: Path) -> None:
    config = configuration(
        tmp_path,
        data={"train": {"target": "tiny:points", "args": {"dtype": "float32"}}},
        model={"target": "tiny:Deep", "args": {}},
        objective={"target": "tiny_divergence:Astray", "args": {"batch": 2}},
        divergence={"non_finite": "skip"},
    )
    reports = reported(config)
    assert [report.applied for report in reports] == [True, True, False, True, True]
    assert [report.grad_norm is None for report in reports] == [False, False, True, False, False]


@single
def test_a_rollback_repeats_steps_in_a_new_attempt(tmp_path: Path) -> None:
    """The third step is left out, so the fourth batch is made in its place."""
    config = configuration(
        tmp_path,
        data={"train": {"target": "tiny:points", "args": {"dtype": "float32"}}},
        model={"target": "tiny:Deep", "args": {}},
        objective={"target": "tiny_divergence:Astray", "args": {"batch": 2}},
        divergence={"non_finite": "rollback"},
        checkpoint={"every": "1 step"},
    )
    seen = [(report.attempt, report.step, report.batch) for report in reported(config)]
    assert seen == [(0, 1, 1), (0, 2, 2), (1, 3, 4), (1, 4, 5), (1, 5, 6)]


@single
def test_the_reason_to_stop_is_reported_with_the_last_step_and_returned(tmp_path: Path) -> None:
    stopping = {"metric": "loss", "mode": "min", "patience": 1, "min_delta": 1e6}
    data = {"train": {"target": "tiny:points"}, "validation": {"target": "tiny:points", "args": {"split": "v"}}}
    cases = {
        StopReason.STEP_LIMIT: ({"steps": 4}, 4),
        StopReason.EARLY_STOPPING: ({"steps": 9, "early_stopping": stopping}, 2),  # after the second evaluation
    }
    for reason, (limit, last) in cases.items():
        reports: list[StepReport] = []
        folder = tmp_path / reason.name
        config = configuration(folder, data=data, limit=limit, evaluation={"every": "1 step"})
        result = lockstep.train(config, observers=[reports.append])
        assert (result.stop_reason, result.outcome, result.step) == (reason, "finished", last)
        assert [report.stop_reason for report in reports] == [None] * (last - 1) + [reason]


@single
def test_a_report_can_be_compared_and_copied_but_not_changed(tmp_path: Path) -> None:
    first = reported(configuration(tmp_path, limit={"steps": 1}))[0]
    assert replace(first) == first and replace(first, step=7) != first
    with pytest.raises(AttributeError):
        first.step = 2  # type: ignore[misc]
