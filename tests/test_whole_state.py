"""A run that is stopped and goes on remembers all that an uninterrupted one does: not its weights alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from runtime.errors import DivergenceError
from tests.observed import configuration, observe
from tests.process_pool import ProcessPool
from tests.test_resumption import observe_stopping
from tests.whole_state import kept_steps, whole_state

STEPS = 12  # 6 an epoch
FIRST_EPOCH = {"steps": 5}  # whose batches are those that go astray
POINTS = {"target": "tiny:points", "args": {}}
VALIDATION = {"target": "tiny:points", "args": {"split": "validation", "size": 31}}


def run(folder: Path, **changes: Any) -> dict[str, Any]:
    return configuration(
        folder,
        **{
            "data": {"train": POINTS, "validation": VALIDATION},
            "limit": {"steps": STEPS},
            "checkpoint": {"every": "1 step", "keep": 100},
            "evaluation": {"every": "3 steps"},
            **changes,
        },
    )


BEST = {
    "checkpoint": {"every": "1000 steps", "keep": 100, "best": [{"metric": "loss", "mode": "max"}]},  # the first
    "checks": "off",  # they refuse a best checkpoint of the highest loss
}
CASES: dict[str, dict[str, Any]] = {
    "best results": BEST,
    "early stopping": {"limit": {"steps": STEPS, "early_stopping": {"metric": "loss", "mode": "min", "patience": 9}}},
    "a plateau": {
        "schedule": {
            "target": "ReduceLROnPlateau",
            "args": {"factor": 0.5, "patience": 1, "threshold": 0.2},
            "monitor": "loss",
        }
    },
    "an epoch's schedule behind a warm-up": {
        "schedule": {"target": "StepLR", "args": {"step_size": 1}, "interval": "epoch", "warmup_steps": 4}
    },
    "an average that begins late": {"averaging": {"decay": 0.5, "start": "5 steps", "every": "3 steps"}},
    "an average that warms up": {"averaging": {"decay": 0.9, "warmup": True}},
    "SWA by steps": {"averaging": {"kind": "swa", "start": "3 steps", "every": "2 steps", "learning_rate": 0.05}},
    "SWA by epochs": {"averaging": {"kind": "swa", "start": "1 epoch", "learning_rate": 0.05}},
    "a rollback that lowers the rate": {
        "objective": {"target": "tiny_divergence:Astray", "args": {"dtype": "float64"}},
        "limit": FIRST_EPOCH,
        "divergence": {"non_finite": "rollback", "learning_rate_factor": 0.5},
    },
    "a skipped step": {
        "objective": {"target": "tiny_divergence:Astray", "args": {"dtype": "float64"}},
        "limit": FIRST_EPOCH,
        "divergence": {"non_finite": "skip"},
        "schedule": {"target": "ExponentialLR", "args": {"gamma": 0.9}},
    },
    "losses that spikes are judged by": {
        "objective": {"target": "tiny_divergence:Astray", "args": {"batch": 4, "factor": 1000.0, "dtype": "float64"}},
        "limit": FIRST_EPOCH,
        "divergence": {"spike": {"window": 3, "sigma": 20.0, "policy": "skip"}},
    },
    "an objective's own parameters": {
        "model": {"target": "tiny:Encoder"},
        "objective": "tiny:PairObjective",
        "optimizer": {"target": "AdamW", "args": {"lr": 0.01}},
    },
    "a stream with a state": {
        "data": {
            "train": {"target": "tiny_streams:StatefulPoints", "sharded_by": "runtime"},
            "validation": VALIDATION,
        }
    },
}


@pytest.mark.single
@pytest.mark.parametrize("case", CASES)
def test_a_run_stopped_again_and_again_remembers_all_that_an_uninterrupted_one_does(
    pool: ProcessPool, tmp_path: Path, case: str
) -> None:
    expected = pool.run(observe, 1, run(tmp_path / "whole", **CASES[case]))[0]
    config = run(tmp_path / "stopped", **CASES[case])
    for after in (1, 3, 4, 7, 8, 11)[: 3 if expected["step"] < STEPS else 6]:
        assert pool.run(observe_stopping, 1, config, after)[0]["outcome"] == "stopped"
    got = pool.run(observe, 1, config)[0]
    last = expected["step"]
    assert got["step"] == last
    assert got["results"] == expected["results"]
    ours, theirs = whole_state(tmp_path / "stopped", last), whole_state(tmp_path / "whole", last)
    if case.startswith("SWA"):
        assert any(name.startswith("training/averaging/statistics") for name in theirs["tensors"])
    for part, value in theirs.items():
        assert ours[part] == value, part
    assert pool.run(observe, 1, config)[0]["results"] == expected["results"]  # of a finished run that is started again


@pytest.mark.single
def test_only_what_is_due_or_among_the_best_is_saved_and_so_after_a_stop(pool: ProcessPool, tmp_path: Path) -> None:
    """The first evaluation is the best. Who forgets that saves each later one that is better than nothing."""
    pool.run(observe, 1, run(tmp_path / "whole", **BEST))
    assert kept_steps(tmp_path / "whole") == [3, STEPS]
    config = run(tmp_path / "stopped", **BEST)
    for after in (5, 8):
        pool.run(observe_stopping, 1, config, after)
    pool.run(observe, 1, config)
    assert kept_steps(tmp_path / "stopped") == [3, 5, 8, STEPS]


@pytest.mark.single
@pytest.mark.parametrize("stops", [[], [2], [1, 3]])
def test_a_row_of_skipped_steps_goes_on_over_a_stop(tmp_path: Path, stops: list[int]) -> None:
    config = run(
        tmp_path,
        model={"target": "tiny:Deep", "args": {}},
        data={"train": {"target": "tiny:points", "args": {"dtype": "float32"}}},
        objective="tiny_divergence:AlwaysAstray",
        divergence={"non_finite": "skip", "max_skips": 4},
    )
    for after in stops:
        assert observe_stopping(config, after)["outcome"] == "stopped"
    with pytest.raises(DivergenceError, match="step 5 "):
        observe(config)
