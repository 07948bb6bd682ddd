"""Which samples make up a batch."""

from __future__ import annotations

import math
import tracemalloc
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, RandomSampler, SequentialSampler, WeightedRandomSampler

from runtime.data.order import IndexOrder, KeyedPermutation, SamplerOrder, WeightedOrder
from runtime.errors import DataError

pytestmark = pytest.mark.single


def epoch_of(order: IndexOrder | SamplerOrder | WeightedOrder, epoch: int) -> list[int]:
    return [int(i) for index in range(order.num_batches(epoch)) for i in order.batch(epoch, index)]


@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
@settings(max_examples=80, deadline=None)
def test_permutation_visits_each_position_once(size: int, key: int) -> None:
    ids = KeyedPermutation(size, key)(np.arange(size))
    assert sorted(ids.tolist()) == list(range(size))


@given(size=st.integers(1, 10**15), key=st.integers(0, 2**64 - 1), start=st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_permutation_of_a_huge_set_is_injective_and_in_range(size: int, key: int, start: float) -> None:
    first = int(start * max(0, size - 200))
    positions = np.arange(first, min(size, first + 200))
    ids = KeyedPermutation(size, key)(positions)
    assert len(set(ids.tolist())) == len(positions)
    assert ids.min() >= 0
    assert ids.max() < size


def test_permutation_of_10_to_the_12_needs_few_evaluations_and_no_large_array(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluated = []
    encipher = KeyedPermutation._encipher

    def counted(self: KeyedPermutation, values: Any) -> Any:
        evaluated.append(len(values))
        return encipher(self, values)

    monkeypatch.setattr(KeyedPermutation, "_encipher", counted)
    positions = np.arange(512)
    for size in (10**12, 2**40 + 1, 3 * 2**38):
        evaluated.clear()
        permutation = KeyedPermutation(size, 7)
        tracemalloc.start()
        permutation(positions)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert sum(evaluated) <= 4 * len(positions)
        assert peak < 20 * positions.nbytes  # a handful of temporaries of the batch's own size


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_every_permutation_of_a_small_set_is_about_equally_likely(size: int) -> None:
    draws = 50 * math.factorial(size)
    seen = Counter(tuple(KeyedPermutation(size, key)(np.arange(size)).tolist()) for key in range(draws))
    assert len(seen) == math.factorial(size)
    assert max(seen.values()) < 1.6 * 50
    assert min(seen.values()) > 0.5 * 50


def test_shuffled_neighbours_are_uncorrelated() -> None:
    ids = KeyedPermutation(100_000, 3)(np.arange(100_000)).astype(float)
    assert abs(np.corrcoef(ids[:-1], ids[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(ids, np.arange(100_000))[0, 1]) < 0.02


@given(size=st.integers(1, 400), batch_size=st.integers(1, 50), seed=st.integers(-5, 5), shuffle=st.booleans())
@settings(max_examples=60, deadline=None)
def test_an_epoch_holds_each_index_once_and_only_its_last_batch_is_smaller(
    size: int, batch_size: int, seed: int, shuffle: bool
) -> None:
    order = IndexOrder(size, batch_size=batch_size, seed=seed, shuffle=shuffle, drop_last=False)
    sizes = [len(order.batch(2, index)) for index in range(order.num_batches(2))]
    assert sorted(epoch_of(order, 2)) == list(range(size))
    assert all(n == batch_size for n in sizes[:-1])
    assert 1 <= sizes[-1] <= batch_size


def test_drop_last_leaves_out_exactly_the_tail() -> None:
    order = IndexOrder(103, batch_size=10, seed=0, shuffle=True, drop_last=True)
    whole = IndexOrder(103, batch_size=10, seed=0, shuffle=True, drop_last=False)
    assert order.num_batches(0) == 10
    assert epoch_of(order, 4) == epoch_of(whole, 4)[:100]


def test_two_epochs_and_two_seeds_differ_and_asking_again_does_not() -> None:
    order = IndexOrder(500, batch_size=7, seed=1, shuffle=True, drop_last=False)
    other = IndexOrder(500, batch_size=7, seed=2, shuffle=True, drop_last=False)
    assert epoch_of(order, 0) != epoch_of(order, 1)
    assert epoch_of(order, 0) != epoch_of(other, 0)
    assert epoch_of(order, 0) == epoch_of(IndexOrder(500, batch_size=7, seed=1, shuffle=True, drop_last=False), 0)


def test_any_batch_can_be_asked_for_out_of_turn() -> None:
    walked = IndexOrder(20_000, batch_size=30, seed=1, shuffle=True, drop_last=False)
    batches = [walked.batch(3, index).tolist() for index in range(walked.num_batches(3))]
    fresh = IndexOrder(20_000, batch_size=30, seed=1, shuffle=True, drop_last=False)
    for index in (600, 3, 273, 274, 666):
        assert fresh.batch(3, index).tolist() == batches[index]


def test_a_sampler_is_drawn_once_per_epoch_under_the_epochs_seed() -> None:
    weights = [1.0] * 50 + [9.0] * 50

    def make() -> SamplerOrder:
        sampler = WeightedRandomSampler(weights, 200)
        return SamplerOrder(sampler, num_samples=100, batch_size=16, seed=5, drop_last=False)

    torch.manual_seed(0)
    first = make()
    drawn = epoch_of(first, 1)
    torch.manual_seed(123)
    assert epoch_of(make(), 1) == drawn
    assert epoch_of(first, 2) != drawn
    assert len(drawn) == 200
    assert np.mean(np.array(drawn) >= 50) == pytest.approx(0.9, abs=0.07)


def test_drawing_a_sampler_leaves_the_default_generator_alone() -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    epoch_of(SamplerOrder(RandomSampler(range(30)), num_samples=30, batch_size=4, seed=0, drop_last=False), 0)
    assert torch.equal(before, torch.get_rng_state())


def test_each_batch_of_a_batch_sampler_is_one_global_batch() -> None:
    sampler = BatchSampler(SequentialSampler(range(10)), 4, drop_last=False)
    order = SamplerOrder(sampler, num_samples=10, batch_size=None, seed=0, drop_last=False)
    assert [order.batch(0, i).tolist() for i in range(order.num_batches(0))] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_a_sampler_that_draws_indices_out_of_range_is_refused() -> None:
    order = SamplerOrder([0, 1, 10], num_samples=10, batch_size=2, seed=0, drop_last=False)
    with pytest.raises(DataError, match="indices from 0 to 9"):
        order.batch(0, 0)


def test_weighted_draws_have_the_frequencies_of_their_weights() -> None:
    weights = np.array([0.0, 1.0, 2.0, 0.5, 0.0, 6.5, 0.0])
    draws = 40_000
    order = WeightedOrder(weights, num_draws=draws, batch_size=64, seed=3, drop_last=False)
    found = np.bincount(epoch_of(order, 1), minlength=len(weights))
    expected = draws * weights / weights.sum()
    drawn = weights > 0
    assert (found[~drawn] == 0).all()
    assert float(((found - expected)[drawn] ** 2 / expected[drawn]).sum()) < 16.3  # chi-square, 3 degrees: p = 0.001


@given(draws=st.integers(1, 40_000), batch_size=st.integers(1, 9000), seed=st.integers(-3, 3))
@settings(max_examples=25, deadline=None)
def test_any_weighted_batch_can_be_asked_for_out_of_turn(draws: int, batch_size: int, seed: int) -> None:
    def made() -> WeightedOrder:
        return WeightedOrder([1, 2, 3], num_draws=draws, batch_size=batch_size, seed=seed, drop_last=False)

    walked, fresh = made(), made()
    batches = [walked.batch(2, index).tolist() for index in range(walked.num_batches(2))]
    assert sum(map(len, batches)) == draws
    for index in reversed(range(len(batches))):
        assert fresh.batch(2, index).tolist() == batches[index]


def test_weighted_draws_differ_between_epochs_and_seeds() -> None:
    def made(seed: int) -> WeightedOrder:
        return WeightedOrder(np.ones(100), batch_size=10, seed=seed, drop_last=False)

    assert epoch_of(made(0), 0) != epoch_of(made(0), 1)
    assert epoch_of(made(0), 0) != epoch_of(made(1), 0)
    assert len(epoch_of(made(0), 0)) == 100


def test_weighted_draws_do_not_repeat_within_a_long_epoch() -> None:
    """They are drawn in blocks of some thousands, each under a key of its own."""
    order = WeightedOrder(np.ones(100), num_draws=5 * 8192, batch_size=8192, seed=0, drop_last=False)
    assert len({order.batch(0, index).tobytes() for index in range(5)}) == 5


@pytest.mark.parametrize("weights", [[], [0, 0], [1, -1], [1, float("nan")], [[1, 2]]])
def test_weights_that_are_none_are_refused(weights: list[float]) -> None:
    with pytest.raises(DataError, match="sampling weights"):
        WeightedOrder(weights, batch_size=2, seed=0, drop_last=False)
