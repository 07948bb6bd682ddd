"""Slots, windows, fillers, the loader and its seeds: equal for every number of ranks and workers."""

from __future__ import annotations

import gc
import itertools
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.data.batches import (
    Cursor,
    SlotAssignment,
    Window,
    Windows,
    default_slots,
    slot_slice,
    slots_of_rank,
    with_weights,
)
from runtime.data.loading import loader_factory
from runtime.data.order import IndexOrder
from runtime.data.samples import Samples
from runtime.errors import DataError
from runtime.randomness import seed_everything
from tests.project.tiny import Failing, Ids, Noisy, add_noise, points

pytestmark = pytest.mark.single


START = Cursor()


def make_loader(num_workers: int = 0) -> Any:
    return loader_factory(
        num_workers=num_workers, prefetch_factor=2, pin_memory=False, timeout_seconds=0, start_method=None
    )


def windows_of(
    samples: Samples,
    *,
    slots: int,
    world_size: int,
    rank: int,
    batch_size: int,
    start: Cursor = START,
    epochs: int = 1,
    num_workers: int = 0,
    seed: int = 0,
    skipped: Sequence[Cursor] = (),
) -> Iterator[Window]:
    order = IndexOrder(len(samples), batch_size=batch_size, seed=seed, shuffle=True, drop_last=False)
    made = Windows(
        samples,
        order,
        start=start,
        stop=lambda cursor, steps: cursor.epoch >= epochs,
        skipped=skipped,
        assignment=SlotAssignment(slots, world_size, rank),
        make_loader=make_loader(num_workers),
    )
    return iter(made)


def ids_of_steps(
    world_size: int, *, slots: int, size: int, batch_size: int, num_workers: int = 0, **options: Any
) -> list[dict[int, list[int]]]:
    """Sample ids by step and slot, gathered over ranks."""
    ranks = [
        windows_of(
            Samples(Ids(size), seed=0),
            slots=slots,
            world_size=world_size,
            rank=rank,
            batch_size=batch_size,
            num_workers=num_workers,
            **options,
        )
        for rank in range(world_size)
    ]
    steps = []
    for windows in zip(*ranks, strict=True):
        assert len({len(window.microbatches) for window in windows}) == 1  # as many rounds on every rank
        assert len({(w.samples, w.real_slots, w.epoch_ends, w.cursor) for w in windows}) == 1
        by_slot = {m.slot: m.batch.tolist() for w in windows for m in w.microbatches if not m.filler}
        assert sum(not m.filler for w in windows for m in w.microbatches) == windows[0].real_slots
        steps.append(by_slot)
    return steps


@given(size=st.integers(1, 60), batch_size=st.integers(1, 20), slots=st.integers(1, 9), world_size=st.integers(2, 4))
@settings(max_examples=40, deadline=None)
def test_the_ids_of_every_step_and_slot_are_equal_for_any_world_size(
    size: int, batch_size: int, slots: int, world_size: int
) -> None:
    alone = ids_of_steps(1, slots=slots, size=size, batch_size=batch_size, epochs=2)
    shared = ids_of_steps(world_size, slots=slots, size=size, batch_size=batch_size, epochs=2)
    assert shared == alone
    half = len(alone) // 2
    for epoch in (alone[:half], alone[half:]):
        assert sorted(i for step in epoch for ids in step.values() for i in ids) == list(range(size))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_the_ids_of_every_step_are_equal_with_workers(world_size: int) -> None:
    alone = ids_of_steps(1, slots=4, size=50, batch_size=12, epochs=2)
    assert ids_of_steps(world_size, slots=4, size=50, batch_size=12, epochs=2, num_workers=2) == alone


def test_starting_at_any_cursor_gives_the_rest_of_the_same_steps() -> None:
    whole = ids_of_steps(2, slots=4, size=50, batch_size=12, epochs=3)
    for epoch in range(3):
        for batch in range(5):
            rest = ids_of_steps(2, slots=4, size=50, batch_size=12, epochs=3, start=Cursor(epoch, batch))
            assert rest == whole[epoch * 5 + batch :]


@pytest.mark.parametrize("epoch", [0, 1, 2])
@pytest.mark.parametrize("batches", [[0], [2], [4], [1, 2], [0, 1, 2, 3, 4]])
def test_batches_that_are_left_out_are_so_in_every_epoch_and_nothing_else_is(epoch: int, batches: list[int]) -> None:
    whole = ids_of_steps(2, slots=4, size=50, batch_size=12, epochs=3)
    skipped = [Cursor(epoch, batch) for batch in batches]
    expected = [step for number, step in enumerate(whole) if Cursor(*divmod(number, 5)) not in skipped]
    assert ids_of_steps(2, slots=4, size=50, batch_size=12, epochs=3, skipped=skipped) == expected


@given(n=st.integers(0, 100), slots=st.integers(1, 20))
@settings(max_examples=50, deadline=None)
def test_slots_partition_a_batch_evenly_and_in_order(n: int, slots: int) -> None:
    ids = np.arange(n)
    parts = [slot_slice(ids, slots, k) for k in range(slots)]
    assert np.concatenate(parts).tolist() == ids.tolist()
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert max(map(len, parts)) == -(-n // slots)


@given(slots=st.integers(1, 30), world_size=st.integers(1, 12))
@settings(max_examples=50, deadline=None)
def test_ranks_share_the_slots_out_evenly_and_in_order(slots: int, world_size: int) -> None:
    shares = [slots_of_rank(slots, world_size, rank) for rank in range(world_size)]
    assert [k for share in shares for k in share] == list(range(slots))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_default_slots_is_the_smallest_multiple_of_the_world_size_that_respects_the_micro_size() -> None:
    assert default_slots(64, 64, 1) == 1
    assert default_slots(64, 16, 1) == 4
    assert default_slots(64, 16, 3) == 6
    assert default_slots(65, 16, 1) == 5
    assert default_slots(64, 64, 8) == 8


def noisy_values(
    world_size: int, num_workers: int, source: Any, transform: Any = None
) -> dict[tuple[int, int, int, int], list[float]]:
    found = {}
    for rank in range(world_size):
        samples = Samples(source, seed=4, transform=transform)
        for window in windows_of(
            samples, slots=4, world_size=world_size, rank=rank, batch_size=12, epochs=2, num_workers=num_workers
        ):
            for microbatch in window.microbatches:
                if not microbatch.filler:
                    batch = microbatch.batch
                    rows = batch if isinstance(batch, torch.Tensor) else torch.cat([batch[0], batch[1][:, None]], 1)
                    for position, row in enumerate(rows.tolist()):
                        found[window.cursor.epoch, window.cursor.batch, microbatch.slot, position] = row
    return found


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 2), (2, 0), (3, 1)])
def test_random_samples_are_equal_for_any_number_of_ranks_and_workers(world_size: int, num_workers: int) -> None:
    reference = noisy_values(1, 0, Noisy())
    assert noisy_values(world_size, num_workers, Noisy()) == reference
    first, second = ({row[0]: row for key, row in reference.items() if key[0] == epoch} for epoch in (0, 1))
    assert len({value for row in first.values() for value in row[1:]}) == 150  # no two samples share a random number
    assert all(first[i][1:] != second[i][1:] for i in first)  # nor do two epochs


def test_a_random_transform_of_a_deterministic_data_set_is_equal_for_any_number_of_ranks_and_workers() -> None:
    source = points("train", 40)
    reference = noisy_values(1, 0, source, add_noise)
    assert noisy_values(2, 2, source, add_noise) == reference
    assert reference[0, 0, 0, 0][0] != source[0][0][0]


def test_reading_random_samples_leaves_the_training_processs_generators_alone() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state(legacy=False)["state"]["key"].copy()
    list(windows_of(Samples(Noisy(), seed=0), slots=2, world_size=1, rank=0, batch_size=10))
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state(legacy=False)["state"]["key"]).all()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_sample_that_cannot_be_read_is_named(num_workers: int) -> None:
    windows = windows_of(
        Samples(Failing(), seed=0), slots=1, world_size=1, rank=0, batch_size=10, num_workers=num_workers
    )
    with pytest.raises(DataError, match=r"sample 7 .*OSError: the seventh sample cannot be read \(at .*tiny.py:\d+\)"):
        list(windows)


def test_a_deterministic_data_set_is_read_a_whole_slot_at_a_time() -> None:
    asked: list[int] = []

    class Counting(Ids):
        def __getitems__(self, ids: list[int]) -> torch.Tensor:
            asked.append(len(ids))
            return super().__getitems__(ids)

        def __getitem__(self, index: int) -> torch.Tensor:
            raise AssertionError("single samples must not be read")

    list(windows_of(Samples(Counting(40), seed=0), slots=2, world_size=1, rank=0, batch_size=20))
    assert asked == [10, 10, 10, 10]


def test_a_list_from_getitems_is_collated() -> None:
    class Listed(Ids):
        def __getitems__(self, ids: list[int]) -> Any:
            return [(torch.tensor(float(i)), i) for i in ids]

    window = next(windows_of(Samples(Listed(6), seed=0), slots=1, world_size=1, rank=0, batch_size=6))
    values, numbers = window.microbatches[0].batch
    assert values.tolist() == numbers.tolist()


def test_a_rank_without_samples_gets_fillers_of_a_batch_that_exists() -> None:
    windows = windows_of(Samples(Ids(2), seed=0), slots=4, world_size=4, rank=0, batch_size=4)
    (window,) = list(windows)
    assert [m.filler for m in window.microbatches] == [True]
    assert window.samples == window.real_slots == 2
    assert window.microbatches[0].batch.numel() == 1


@pytest.mark.parametrize("ahead", [1, 3, 8])
def test_global_weights_are_the_same_number_for_any_sharing_out(ahead: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight_of = torch.rand(50, generator=generator, dtype=torch.float64)

    def weights(world_size: int) -> list[list[float]]:
        shares: list[list[torch.Tensor]] = []
        for rank in range(world_size):
            blocks: list[torch.Tensor] = []

            def begin_sum(block: torch.Tensor, blocks: list[torch.Tensor] = blocks) -> Callable[[], torch.Tensor]:
                blocks.append(block.clone())
                return lambda: block

            windows = windows_of(Samples(Ids(50), seed=0), slots=4, world_size=world_size, rank=rank, batch_size=12)
            list(
                with_weights(
                    windows,
                    weigh=lambda ids, samples: float(weight_of[ids].sum()),
                    slots=4,
                    begin_sum=begin_sum,
                    ahead=ahead,
                )
            )
            shares.append(blocks)
        return [torch.stack(blocks).sum(0).flatten(1).sum(1).tolist() for blocks in zip(*shares, strict=True)]

    assert weights(1) == weights(2) == weights(3)
    assert sum(w for block in weights(1) for w in block) == pytest.approx(float(weight_of.sum()))


@pytest.mark.parametrize("ahead", [1, 3, 8])
def test_each_step_has_the_weight_of_its_own_samples(ahead: int) -> None:
    windows = windows_of(Samples(Ids(200), seed=0), slots=4, world_size=1, rank=0, batch_size=12)
    weighed = with_weights(
        windows,
        weigh=lambda ids, samples: float(ids.sum()),
        slots=4,
        begin_sum=lambda block: lambda: block,
        ahead=ahead,
    )
    found = [(window.weight, sum(int(m.batch.sum()) for m in window.microbatches)) for window in weighed]
    assert len(found) == 17
    assert all(weight == expected for weight, expected in found)


@pytest.mark.parametrize("num_weights", [None, 2])
@pytest.mark.parametrize("scale", [1.0, 0.1, 1e17])
def test_one_process_gives_steps_the_weights_that_a_sum_over_ranks_gives_bit_for_bit(
    num_weights: int | None, scale: float
) -> None:
    def weigh(ids: torch.Tensor, samples: int) -> float | tuple[float, float]:
        weight = scale * float(ids.sum())
        return weight if num_weights is None else (weight, weight / 3)

    def weights(begin_sum: Any) -> list[Any]:
        windows = windows_of(Samples(Ids(200), seed=0), slots=5, world_size=1, rank=0, batch_size=12)
        read = with_weights(windows, weigh=weigh, num_weights=num_weights, slots=5, begin_sum=begin_sum, ahead=1)
        return [window.weight for window in read]

    assert weights(None) == weights(lambda block: lambda: block)


def test_weights_are_on_their_way_before_the_step_that_needs_them() -> None:
    events: list[str] = []

    def begin_sum(weights: torch.Tensor) -> Callable[[], torch.Tensor]:
        events.append("begun")
        return lambda: events.append("read") or weights  # type: ignore[func-returns-value]

    windows = windows_of(Samples(Ids(20), seed=0), slots=1, world_size=1, rank=0, batch_size=2)
    weighed = with_weights(windows, weigh=lambda ids, samples: 1.0, slots=1, begin_sum=begin_sum, ahead=4)
    for _ in weighed:
        events.append("step")  # noqa: PERF401 - the generator writes to the same list
    assert events == [
        *("begun", "read", "step", "step"),
        *("begun", "step", "step", "read", "step", "step"),
        *("begun", "step", "step", "read", "step"),  # the last block has two steps
        "step",
    ]


def test_several_weights_are_summed_each_and_nothing_at_all_is_zero() -> None:
    windows = windows_of(Samples(Ids(20), seed=0), slots=3, world_size=1, rank=0, batch_size=8)
    weighed = itertools.count()

    def weigh(ids: torch.Tensor, samples: int) -> tuple[float, float]:
        of_first_step = next(weighed) < 3
        return float(samples), float((ids % 2 == 0).sum()) if of_first_step else 0.0

    totals: list[Any] = []
    for window in with_weights(
        windows, weigh=weigh, num_weights=2, slots=3, begin_sum=lambda block: lambda: block, ahead=1
    ):
        ids = torch.cat([microbatch.batch for microbatch in window.microbatches])
        totals.append((window.weight, float(len(ids)), float((ids % 2 == 0).sum())))
    assert totals[0][0] == totals[0][1:]
    assert totals[1][0] == (8.0, 0.0)
    windows = windows_of(Samples(Ids(8), seed=0), slots=3, world_size=1, rank=0, batch_size=8)
    nothing = with_weights(
        windows, weigh=lambda ids, samples: (0.0, 0.0), num_weights=2, slots=3, begin_sum=lambda block: lambda: block
    )
    assert next(nothing).weight == 0.0


def test_the_weight_of_samples_is_known_without_a_reduction() -> None:
    windows = windows_of(Samples(Ids(50), seed=0), slots=4, world_size=3, rank=1, batch_size=12)
    assert [window.weight for window in windows] == [12, 12, 12, 12, 2]


def test_seeding_gives_the_numbers_that_users_know_from_each_library() -> None:
    import random

    random.gauss(0, 1)  # leaves its second number for the next call
    seed_everything(12345, torch.device("cpu"))
    drawn = [random.random(), random.gauss(0, 1), float(np.random.rand()), float(torch.rand(()))]
    random.seed(12345)
    np.random.seed(12345)
    torch.manual_seed(12345)
    assert drawn == [random.random(), random.gauss(0, 1), float(np.random.rand()), float(torch.rand(()))]


def test_workers_end_with_the_windows_they_read_for_and_not_at_a_later_collection() -> None:
    before = set(multiprocessing.active_children())
    windows = windows_of(
        Samples(Ids(64), seed=0), slots=2, world_size=2, rank=0, batch_size=4, epochs=1000, num_workers=2
    )
    next(windows)
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    gc.disable()
    try:
        del windows
        assert not any(worker.is_alive() for worker in workers)
    finally:
        gc.enable()
