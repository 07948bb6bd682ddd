"""What is saved at once as one of the best, is so of all results; values against sorting all of them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.checkpoints.best import BestResults, ranked
from runtime.config.sections import BestSection

pytestmark = pytest.mark.single

VALUES = st.lists(st.sampled_from([0.25, 0.5, 0.75, 1.0, math.nan, math.inf, -math.inf]), max_size=12)


@given(values=VALUES, resumed_after=st.integers(0, 12), keep=st.integers(1, 3), largest=st.booleans())
def test_saving_what_is_best_so_far_saves_the_best_of_all(
    values: list[float], resumed_after: int, keep: int, largest: bool
) -> None:
    wanted = BestSection(metric="score", mode="max" if largest else "min", keep=keep)
    results = [{"step": step, "score": value} for step, value in enumerate(values)]
    saved: list[dict[str, float]] = []
    best = BestResults([wanted], saved)
    for number, result in enumerate(results):
        if number == resumed_after:
            best = BestResults([wanted], saved)
        if best.improved_by(result):
            saved.append(result)
            best.add(result)
    finite = [result for result in results if math.isfinite(result["score"])]
    expected = sorted(finite, key=lambda result: (-result["score"] if largest else result["score"], result["step"]))
    assert ranked(saved, wanted, lambda result: result) == expected[:keep]


def test_what_is_no_number_is_no_best() -> None:
    best = BestResults([BestSection(metric="confusion", mode="max"), BestSection(metric="absent", mode="min")], [])
    assert not best.improved_by({"confusion": [[1, 2], [3, 4]], "loss": 0.5})


def test_one_of_several_metrics_is_enough() -> None:
    wanted = [BestSection(metric="loss", mode="min"), BestSection(metric="accuracy", mode="max")]
    best = BestResults(wanted, [{"loss": 0.5, "accuracy": 0.5}])
    assert best.improved_by({"loss": 0.6, "accuracy": 0.6})
    assert best.improved_by({"loss": 0.4, "accuracy": 0.4})
    assert not best.improved_by({"loss": 0.5, "accuracy": 0.5})
    assert not best.improved_by({"loss": 0.6, "accuracy": 0.4})
