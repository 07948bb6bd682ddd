"""A run whose limit is raised is the run that had the higher limit from the beginning: in state and in decisions, bit for bit.

The end of a run makes an evaluation and a report that its intervals do not ask for. Nothing may follow from them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runtime.checkpoints.load import load_state
from runtime.checkpoints.serialization import split_state
from tests.observed import configuration, observe
from tests.process_pool import ProcessPool
from tests.test_resumption import observe_stopping

WATCHED = {"metric": "loss", "mode": "min", "patience": 3, "min_delta": 0.001}


def uneven(folder: Path, limit: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Evaluates every 3 steps; 7 steps an epoch, so that hardly anything is due where an epoch ends."""
    return configuration(
        folder,
        **{
            "data": {
                "train": {"target": "tiny:points", "args": {"size": 104}},
                "validation": {"target": "tiny:points", "args": {"split": "validation", "size": 50}},
                "test": {"target": "tiny:points", "args": {"split": "test", "size": 20}},
            },
            "optimizer": {"target": "SGD", "args": {"lr": 0.6, "momentum": 0.9}},
            "evaluation": {"every": "3 steps", "micro_size": 16},
            "checkpoint": {"every": "5 steps", "keep": 1, "best": [{"metric": "loss", "mode": "min", "keep": 2}]},
            "reporting": {"every": "4 steps", "progress": False},
            "limit": limit,
            **changes,
        },
    )


def newest_state(folder: Path) -> dict[str, bytes]:
    """Return all of the newest checkpoint but what names the start that saved it."""
    newest = max((folder / "checkpoints").glob("step-*"))
    model, training = load_state(newest)
    kept = {key: value for key, value in training.items() if key not in ("identity", "made_by")}
    tree, tensors = split_state({"model": model, **kept})
    return {"tree": repr(tree).encode(), **{name: value.numpy().tobytes() for name, value in tensors.items()}}


def records(folder: Path, event: str) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["event"] == event]


def figures(folder: Path, event: str) -> dict[int, tuple[float, float | None]]:
    told = [r for r in records(folder, event) if r.get("split") != "test"]
    return {r["step"]: (r["loss"], r.get("learning_rate")) for r in told}


def best(folder: Path) -> Any:
    return json.loads((folder / "checkpoints" / "best.json").read_text())


def assert_same_run(raised: Path, whole: Path) -> None:
    """Compare all of the last state, what is the best, and every figure that the run with the higher limit has told."""
    assert newest_state(raised) == newest_state(whole)
    assert best(raised) == best(whole)
    for event in ("evaluation", "train"):
        told, expected = figures(raised, event), figures(whole, event)
        assert {step: told.get(step) for step in expected} == expected, event


PLATEAU = {
    "target": "ReduceLROnPlateau",
    "args": {"factor": 0.5, "patience": 0, "threshold": 0.05},
    "monitor": "loss",
    "warmup_steps": 2,
}
SWA = {"kind": "swa", "start": "2 steps", "every": "5 steps", "learning_rate": 0.05, "anneal": {"steps": 3}}
STEPS, EPOCHS = ({"steps": 13}, {"steps": 14}, {"steps": 60}), ({"epochs": 1}, {"epochs": 2}, {"epochs": 6})


@pytest.mark.parametrize(
    ("limits", "changes"),
    [
        pytest.param(STEPS, {"schedule": PLATEAU}, id="plateau"),
        pytest.param(EPOCHS, {"schedule": PLATEAU, "evaluation": {"every": "4 epochs"}}, id="plateau by epochs"),
        pytest.param(EPOCHS, {"schedule": PLATEAU}, id="plateau and epochs"),
        pytest.param(STEPS, {"stopping": WATCHED}, id="early stopping"),
        pytest.param(EPOCHS, {"stopping": WATCHED, "schedule": PLATEAU}, id="early stopping and epochs"),
        pytest.param(STEPS, {"averaging": SWA}, id="an average that is evaluated"),
        pytest.param(STEPS, {"averaging": {**SWA, "evaluate": False}}, id="one that is not"),
        pytest.param(
            (STEPS[1], STEPS[2]), {"averaging": {**SWA, "evaluate": False}, "stopping": WATCHED}, id="one that may end"
        ),
        pytest.param(
            STEPS, {"schedule": {"target": "CosineAnnealingLR", "args": {"T_max": 70}}}, id="a length of its own"
        ),
    ],
)
@pytest.mark.single
def test_a_raised_limit_leaves_no_trace(
    pool: ProcessPool, tmp_path: Path, limits: tuple[dict[str, Any], ...], changes: dict[str, Any]
) -> None:
    changes = dict(changes)
    stopping = changes.pop("stopping", None)
    early = {} if stopping is None else {"early_stopping": stopping}
    whole = pool.run(observe, 1, uneven(tmp_path / "whole", {**limits[-1], **early}, **changes))[0]
    for limit in limits:
        raised = pool.run(observe, 1, uneven(tmp_path / "raised", {**limit, **early}, **changes))[0]
        assert raised["outcome"] == "finished"
    assert raised["step"] == whole["step"]
    assert (stopping is None) == (whole["step"] in (42, 60))
    assert_same_run(tmp_path / "raised", tmp_path / "whole")
    assert raised["results"] == whole["results"]


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.single), 2])
def test_stops_in_the_extra_evaluation_and_in_one_that_is_due_leave_no_trace(
    pool: ProcessPool, tmp_path: Path, world_size: int
) -> None:
    changes = {"schedule": PLATEAU, "averaging": SWA}
    early = {"early_stopping": {**WATCHED, "patience": 5}}
    pool.run(observe, world_size, uneven(tmp_path / "whole", {"steps": 40, **early}, **changes))
    # The extra evaluation is cut short and its limit is raised; it is cut short and made later; one that is due is cut short.
    for limit, after in ((13, 14), (14, 15), (14, None), (15, 16), (40, None)):
        config = uneven(tmp_path / "cut", {"steps": limit, **early}, **changes)
        left = pool.run(observe_stopping, world_size, config, after)[0]
        assert left["outcome"] == ("finished" if after is None else "stopped")
        if after is not None:
            assert left["step"] == limit
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.single
def test_the_end_of_a_run_may_be_the_best_only_while_the_run_ends_there(pool: ProcessPool, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"checks": "off"}  # they refuse a best checkpoint of the highest loss
    changes["checkpoint"] = {"every": "1000 steps", "keep": 1, "best": [{"metric": "loss", "mode": "max"}]}
    changes["optimizer"] = {"target": "SGD", "args": {"lr": 0.02}}  # the loss falls: the first evaluation has most
    pool.run(observe, 1, uneven(tmp_path, {"steps": 2}, **changes))
    assert [entry["step"] for entry in best(tmp_path)["loss"]] == [2]  # there is no other
    pool.run(observe, 1, uneven(tmp_path, {"steps": 7}, **changes))
    assert [entry["step"] for entry in best(tmp_path)["loss"]] == [3]
    names = sorted(path.name[:13] for path in (tmp_path / "checkpoints").glob("step-*"))
    assert names == ["step-00000003", "step-00000007"]


@pytest.mark.single
def test_a_schedule_that_follows_the_limit_refuses_another_limit(pool: ProcessPool, tmp_path: Path) -> None:
    changes = {"schedule": "CosineAnnealingLR"}
    pool.run(observe, 1, uneven(tmp_path, {"steps": 13}, **changes))
    with pytest.raises(AssertionError, match="the schedule's length is derived from it: was 13, is 60"):
        pool.run(observe, 1, uneven(tmp_path, {"steps": 60}, **changes))
