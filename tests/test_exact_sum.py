"""A sum of floats that is rounded once is the float nearest to the true sum, in any order and however it is shared out."""

from __future__ import annotations

import json
import math
import random
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.exact_sum import ExactSum, exact_sums

pytestmark = pytest.mark.single
FINITE = st.floats(allow_nan=False, allow_infinity=False, max_value=1e300, min_value=-1e300)


@given(st.lists(FINITE, max_size=40), st.randoms(use_true_random=False))
@settings(max_examples=300, deadline=None)
def test_the_value_is_the_float_nearest_to_the_sum(terms: list[float], chance: random.Random) -> None:
    expected = float(sum(map(Fraction, terms), Fraction(0)))
    assert ExactSum(terms).value == expected
    chance.shuffle(terms)
    cut = chance.randint(0, len(terms))
    parts = [json.loads(json.dumps(ExactSum(share).parts)) for share in (terms[:cut], terms[cut:])]
    total = exact_sums([{"loss": share} for share in parts])["loss"]
    assert total.value == expected
    assert total.parts == ExactSum(terms).parts
    assert len(total.parts) < 45  # as many as 2100 bits need, however many terms there are


def test_a_huge_term_that_is_cancelled_leaves_the_small_ones() -> None:
    assert ExactSum([1e300, 1.0, -1e300, 2.0**-60]).value == 1.0 + 2.0**-60
    assert ExactSum([0.1] * 10).value == 1.0


@pytest.mark.parametrize(
    ("terms", "value"),
    [([math.inf, 1.0], math.inf), ([-math.inf, 1e308], -math.inf), ([math.inf, -math.inf], math.nan)],
)
def test_what_is_not_finite_decides(terms: list[float], value: float) -> None:
    for order in (terms, terms[::-1]):
        total = ExactSum(ExactSum(order).parts)
        assert total.value == value or (math.isnan(total.value) and math.isnan(value))


def test_names_that_some_ranks_lack_are_summed_over_the_others() -> None:
    sums = exact_sums([{"a": [1.0, 2.0]}, {"b": [4.0]}, {"a": [8.0]}])
    assert {name: total.value for name, total in sums.items()} == {"a": 11.0, "b": 4.0}
    assert ExactSum().value == 0.0
