"""Orders by a value of each sample: coverage, bounds and balance; equal for any ranks, workers and starts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from runtime.data.batches import Cursor
from runtime.data.batching import BalancedOrder, BudgetOrder, LengthGroupedOrder
from runtime.data.order import IndexOrder, Order, SamplerOrder, WeightedOrder
from runtime.errors import DataError
from tests.project.tiny import Ids
from tests.reading import read_steps

pytestmark = pytest.mark.single

SIZE = 41
LENGTHS = np.random.default_rng(0).integers(1, 30, SIZE)
CLASSES = np.repeat([0, 1, 2], [30, 8, 3])


def batches_of(order: Order, epoch: int) -> list[list[int]]:
    return [order.batch(epoch, index).tolist() for index in range(order.num_batches(epoch))]


def flat(batches: list[list[int]]) -> list[int]:
    return [i for batch in batches for i in batch]


def sampler_order(sampler: Any, batch_size: int | None = 6) -> SamplerOrder:
    return SamplerOrder(sampler, num_samples=SIZE, batch_size=batch_size, seed=1, drop_last=False)


ORDERS: dict[str, tuple[Callable[[], Order], list[int] | None]] = {
    "sequential": (
        lambda: IndexOrder(SIZE, batch_size=6, seed=1, shuffle=False, drop_last=False),
        list(range(SIZE)),
    ),
    "random": (lambda: IndexOrder(SIZE, batch_size=6, seed=1, shuffle=True, drop_last=False), list(range(SIZE))),
    "subset": (lambda: sampler_order(SubsetRandomSampler(range(3, 30))), list(range(3, 30))),
    "weighted": (lambda: sampler_order(WeightedRandomSampler(LENGTHS.tolist(), 50)), None),
    "keyed weights": (lambda: WeightedOrder(LENGTHS, num_draws=50, batch_size=6, seed=1, drop_last=False), None),
    "batch sampler": (
        lambda: sampler_order(BatchSampler(RandomSampler(range(SIZE)), 7, drop_last=False), None),
        list(range(SIZE)),
    ),
    "lengths": (lambda: LengthGroupedOrder(LENGTHS, batch_size=6, seed=1, stretch_batches=3), list(range(SIZE))),
    "budget": (lambda: BudgetOrder(LENGTHS, budget=90, seed=1, max_samples=8), list(range(SIZE))),
    "balanced": (lambda: BalancedOrder(CLASSES, batch_size=6, seed=1), None),
}


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than this machine has cores
@pytest.mark.parametrize(
    ("name", "world_size", "num_workers"),
    [
        *((name, world_size, 0) for name in ORDERS for world_size in (1, 2, 3)),
        ("budget", 1, 3),
        ("balanced", 2, 1),
        ("lengths", 3, 1),
        ("random", 3, 3),
    ],
)
def test_what_ranks_and_workers_read_together_is_the_order_also_after_an_interruption(
    name: str, world_size: int, num_workers: int
) -> None:
    make, covered = ORDERS[name]
    order = make()
    expected = {Cursor(e, b): ids for e in range(2) for b, ids in enumerate(batches_of(order, e))}
    found = read_steps(Ids(SIZE), make, world_size=world_size, num_workers=num_workers)
    assert {cursor: [i for slot in slots for i in slot.tolist()] for cursor, slots in found.items()} == expected
    if covered is not None:
        for epoch in range(2):
            seen = [ids for cursor, ids in expected.items() if cursor.epoch == epoch]
            assert sorted(flat(seen)) == covered
    # Another number of processes goes on in the middle of the second epoch.
    start = Cursor(1, 2)
    rest = read_steps(Ids(SIZE), make, world_size=4 - world_size, num_workers=num_workers % 2, start=start)
    assert {c: [i for slot in slots for i in slot.tolist()] for c, slots in rest.items()} == {
        cursor: ids for cursor, ids in expected.items() if cursor >= start
    }


@given(
    lengths=st.lists(st.integers(1, 100), min_size=1, max_size=300),
    batch_size=st.integers(1, 20),
    stretch=st.integers(1, 5),
    drop_last=st.booleans(),
    epoch=st.integers(0, 3),
)
@settings(max_examples=40, deadline=None)
def test_length_groups_cover_once_and_sort_within_stretches(
    lengths: list[int], batch_size: int, stretch: int, drop_last: bool, epoch: int
) -> None:
    found = np.array(lengths)
    order = LengthGroupedOrder(found, batch_size=batch_size, seed=2, drop_last=drop_last, stretch_batches=stretch)
    batches = batches_of(order, epoch)
    whole, rest = divmod(len(lengths), batch_size)
    assert [len(b) for b in batches] == [batch_size] * whole + [rest] * (rest > 0 and not drop_last)
    ids = flat(batches)
    assert len(set(ids)) == len(ids) == sum(map(len, batches))
    plain = IndexOrder(len(lengths), batch_size=batch_size, seed=2, shuffle=True, drop_last=drop_last)
    shuffled = flat(batches_of(plain, epoch))
    assert sorted(ids) == sorted(shuffled)  # what drop_last leaves out is a random part, not the shortest
    # Each batch is a stretch's n-th longest samples: an independent sort of the same permutation.
    expected = set()
    for start in range(0, len(shuffled), stretch * batch_size):
        part = sorted(found[shuffled[start : start + stretch * batch_size]].tolist(), reverse=True)
        expected |= {tuple(part[s : s + batch_size]) for s in range(0, len(part), batch_size)}
    assert {tuple(found[batch].tolist()) for batch in batches} == expected


def test_grouping_by_length_pads_far_less_than_shuffling_and_batches_do_not_fall_in_length() -> None:
    lengths = np.random.default_rng(1).geometric(0.02, 5000)
    order = LengthGroupedOrder(lengths, batch_size=20, seed=0)
    batches = [lengths[batch] for batch in batches_of(order, 0)]

    def padded(found: list[np.ndarray]) -> int:
        return sum(int(b.max()) * len(b) for b in found)

    plain = IndexOrder(5000, batch_size=20, seed=0, shuffle=True, drop_last=False)
    shuffled = [lengths[batch] for batch in batches_of(plain, 0)]
    assert padded(batches) < 1.1 * lengths.sum() < padded(shuffled) / 2.5
    longest = np.array([b.max() for b in batches], dtype=float)
    assert abs(np.corrcoef(longest, np.arange(len(longest)))[0, 1]) < 0.2
    assert batches_of(order, 0) != batches_of(order, 1)


@given(
    lengths=st.lists(st.integers(0, 50), min_size=1, max_size=300),
    budget=st.integers(50, 400),
    most=st.integers(1, 40),
    padded=st.booleans(),
    shuffle=st.booleans(),
    epoch=st.integers(0, 2),
)
@settings(max_examples=60, deadline=None)
def test_no_batch_is_above_the_budget_and_every_sample_comes_once(
    lengths: list[int], budget: int, most: int, padded: bool, shuffle: bool, epoch: int
) -> None:
    found = np.array(lengths)
    order = BudgetOrder(
        found, budget=budget, seed=4, max_samples=most, padded=padded, shuffle=shuffle, stretch_batches=3
    )
    batches = batches_of(order, epoch)
    assert sorted(flat(batches)) == list(range(len(lengths)))
    for batch in batches:
        own = found[batch]
        assert 1 <= len(batch) <= most
        assert (own.max() * len(batch) if padded else own.sum()) <= budget
    if not shuffle:
        assert flat(batches) == list(range(len(lengths)))
        for batch, following in pairwise(batches):  # each is as full as it can be
            more = found[[*batch, following[0]]]
            assert len(more) > most or (more.max() * len(more) if padded else more.sum()) > budget


def test_a_budget_is_used_well() -> None:
    lengths = np.random.default_rng(1).geometric(0.02, 5000).clip(max=500)
    for padded in (True, False):
        order = BudgetOrder(lengths, budget=4000, seed=0, max_samples=5000, padded=padded)
        assert order.num_batches(0) < 1.15 * lengths.sum() / 4000


def test_a_sample_above_the_budget_is_named() -> None:
    with pytest.raises(DataError, match=r"sample 1 alone has 9 tokens, more than data.budget.tokens 8 .*2 of 3"):
        BudgetOrder(np.array([3, 9, 10]), budget=8, seed=0, max_samples=4)


@given(
    members=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    num_samples=st.integers(1, 120),
    batch_size=st.integers(1, 20),
)
@settings(max_examples=40, deadline=None)
def test_classes_come_equally_often_and_so_do_their_members(
    members: list[int], num_samples: int, batch_size: int
) -> None:
    classes = np.random.default_rng(0).permutation(np.repeat(np.arange(len(members)), members))
    order = BalancedOrder(classes, batch_size=batch_size, seed=3, num_samples=num_samples)
    drawn: Counter[int] = Counter()
    for epoch in range(4):
        ids = flat(batches_of(order, epoch))
        assert len(ids) == num_samples
        of_class = np.bincount(classes[ids], minlength=len(members))
        assert of_class.max() - of_class.min() <= 1
        drawn.update(ids)
    for label in range(len(members)):  # over all epochs
        counts = [drawn[int(i)] for i in np.flatnonzero(classes == label)]
        assert max(counts) - min(counts) <= 1


def test_balanced_draws_are_random_and_epochs_differ() -> None:
    order = BalancedOrder(CLASSES, batch_size=SIZE, seed=3)
    first, second = order.batch(0, 0), order.batch(1, 0)
    assert first.tolist() != second.tolist()
    assert len(set(CLASSES[first][:12].tolist())) == 3  # mixed, not class after class
    turns = [BalancedOrder(CLASSES, batch_size=SIZE, seed=s).batch(0, 0).tolist() for s in range(300)]
    counts = Counter(i for turn in turns for i in turn if i < 30)
    assert min(counts.values()) > 100  # 14 of 30 members are drawn in an epoch: 140 expected
    assert max(counts.values()) < 180


def test_a_class_of_one_sample_among_many_is_drawn_quickly() -> None:
    classes = np.zeros(200_000, dtype=np.int64)
    classes[77] = 1
    order = BalancedOrder(classes, batch_size=100, seed=0)
    assert sum(int((order.batch(0, index) == 77).sum()) for index in range(order.num_batches(0))) == 100_000
