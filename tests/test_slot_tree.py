"""Sums over slots are the same bits for any number of ranks, also for values that floating-point numbers are bad at."""

from __future__ import annotations

import math
import operator
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.data.batches import slots_of_rank
from runtime.distributed.slot_tree import Node, RunningSum, cover, most_held, total

pytestmark = pytest.mark.single
FLOAT32 = st.floats(width=32)
NASTY = st.sampled_from(
    [0.0, -0.0, 1e-45, -1e-45, 1.17549435e-38, 3.4e38, -3.4e38, 1.0, -1.0, 2.0**-24, math.inf, math.nan]
)


def summed(values: list[np.float32 | None], world_size: int) -> np.float32 | None:
    """The sum as that many ranks compute it; None is a slot without a value."""
    covers, sums = list[Node](), list[np.float32 | None]()
    for rank in range(world_size):
        slots = slots_of_rank(len(values), world_size, rank)
        running = RunningSum[np.float32](slots, operator.add)
        for slot in slots:
            if (value := values[slot]) is not None:
                running.put(Node(0, slot), value)
        covers += cover(slots)
        sums += running.take()
    return total(zip(covers, sums, strict=True), operator.add)


def bits(value: np.float32 | None) -> bytes | None:
    """The value's bits; all NaNs are one."""
    return None if value is None else b"nan" if np.isnan(value) else value.tobytes()


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
@given(st.lists(st.one_of(st.none(), FLOAT32, NASTY), min_size=1, max_size=40))
@settings(max_examples=500, deadline=None)
def test_the_sum_is_the_same_bits_for_any_number_of_ranks(given_values: list[float | None]) -> None:
    values = [None if value is None else np.float32(value) for value in given_values]
    alone = bits(summed(values, 1))
    for world_size in range(2, len(values) + 3):
        assert bits(summed(values, world_size)) == alone


@given(st.lists(FLOAT32.filter(lambda x: math.isfinite(x) and abs(x) < 1e30), min_size=1, max_size=64))
@settings(max_examples=300, deadline=None)
def test_the_error_grows_with_the_logarithm_of_the_number_of_slots(given_values: list[float]) -> None:
    values = [np.float32(value) for value in given_values]
    result, exact = summed(list(values), 1), sum(map(Fraction, given_values))
    assert result is not None
    magnitude = sum(abs(Fraction(value)) for value in given_values)
    bound = math.ceil(math.log2(len(values))) * Fraction(1, 2**24) * magnitude * Fraction(1001, 1000)
    assert abs(Fraction(float(result)) - exact) <= bound + Fraction(1, 2**149)


def test_one_huge_among_many_tiny_terms_does_not_swallow_them() -> None:
    values = np.full(2**16, 2.0**-24, dtype=np.float32)
    values[123] = 1.0
    one_after_another = np.float32(0)
    for value in values:
        one_after_another += value
    assert one_after_another - 1 < 2.0**-16  # a float32 sum from left to right loses all after the huge one
    alone = summed(list(values), 1)
    assert alone is not None
    assert abs(float(alone) - (1 + (2**16 - 1) * 2.0**-24)) < 17 * 2.0**-24
    assert bits(summed(list(values), 3)) == bits(alone)


@pytest.mark.parametrize(
    ("slots", "nodes"),
    [
        (range(8), [(3, 0)]),
        (range(6), [(2, 0), (1, 2)]),
        (range(3, 6), [(0, 3), (1, 2)]),
        (range(1, 8), [(0, 1), (1, 1), (2, 1)]),
        (range(5, 5), []),
    ],
)
def test_a_ranks_slots_are_covered_by_the_fewest_nodes(slots: range, nodes: list[tuple[int, int]]) -> None:
    assert cover(slots) == [Node(*node) for node in nodes]
    assert [slot for node in cover(slots) for slot in node.slots] == list(slots)


def test_a_rank_holds_as_many_sums_as_the_tree_is_deep() -> None:
    assert [most_held(range(slots)) for slots in (1, 2, 4, 1024)] == [1, 2, 3, 11]
    assert most_held(range(3, 6)) == 3


def test_a_pair_may_come_as_one_node() -> None:
    running = RunningSum[float](range(2, 7), operator.add)
    running.put(Node(1, 1), 3.0)
    running.put(Node(0, 4), 5.0)
    running.put(Node(0, 6), 6.0)
    assert running.take() == [3.0, 5.0, 6.0]
