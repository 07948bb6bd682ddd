"""Streams: the same global batches for any number of ranks and workers, each item once, resumed exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from runtime.data.batches import Cursor, SlotAssignment
from runtime.data.loading import loader_factory
from runtime.data.stream_pieces import StreamIndex
from runtime.data.stream_windows import StreamWindows
from runtime.data.streams import StreamSamples
from runtime.errors import DataError
from tests.project.tiny_streams import Numbers, Refilled, Shares, Stateful, StatefulShares, UnevenShares

pytestmark = [pytest.mark.single, pytest.mark.filterwarnings("ignore:This DataLoader will create")]

START = Cursor()


def loader(num_workers: int) -> Any:
    return loader_factory(
        num_workers=num_workers, prefetch_factor=2, pin_memory=False, timeout_seconds=0, start_method=None
    )


def steps_of(
    source: Any,
    *,
    batch_size: int,
    slots: int,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    epochs: int = 2,
    start: Cursor = START,
    sharded_by: Any = "runtime",
    sum_over_ranks: Any = lambda table: table,
    **options: Any,
) -> list[dict[str, Any]]:
    windows = StreamWindows(
        StreamSamples(
            source, sharded_by=sharded_by, batch_size=batch_size, seed=0, drop_last=options.pop("drop_last", False)
        ),
        start=start,
        stop=lambda cursor, steps: cursor.epoch >= epochs,
        assignment=SlotAssignment(slots, world_size, rank),
        make_loader=loader(num_workers),
        num_workers=num_workers,
        weigh=None,
        sum_over_ranks=sum_over_ranks,
        **options,
    )
    return [
        {
            "cursor": window.cursor,
            "next": window.next_cursor,
            "samples": window.samples,
            "weight": window.weight,
            "real_slots": window.real_slots,
            "ends": window.epoch_ends,
            "run_ends": window.run_ends,
            "rounds": len(window.microbatches),
            "slots": {m.slot: m.batch.tolist() for m in window.microbatches if not m.filler},
        }
        for window in windows
    ]


def items(steps: list[dict[str, Any]], epoch: int) -> list[int]:
    return [i for step in steps if step["cursor"].epoch == epoch for ids in step["slots"].values() for i in ids]


@pytest.mark.parametrize("size", [1, 7, 16, 35, 96])
@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_one_process_sees_each_item_once_an_epoch_whatever_its_workers(size: int, num_workers: int) -> None:
    steps = steps_of(Numbers(size, buffer=5), batch_size=16, slots=4, num_workers=num_workers)
    assert steps == steps_of(Numbers(size, buffer=5), batch_size=16, slots=4)
    for epoch in range(2):
        assert sorted(items(steps, epoch)) == [i + 1000 * epoch for i in range(size)]
    assert [step["ends"] for step in steps] == [step["next"].batch == 0 for step in steps]
    assert [step["run_ends"] for step in steps] == [False] * (len(steps) - 1) + [True]
    assert all(step["samples"] == 16 for step in steps if not step["ends"])


def test_an_unshuffled_stream_is_cut_as_mapped_data_is() -> None:
    steps = steps_of(Numbers(21), batch_size=8, slots=3, epochs=1)
    assert [step["slots"] for step in steps] == [
        {0: [0, 1], 1: [2, 3, 4], 2: [5, 6, 7]},
        {0: [8, 9], 1: [10, 11, 12], 2: [13, 14, 15]},
        {0: [16], 1: [17, 18], 2: [19, 20]},
    ]


def test_shuffling_differs_between_epochs_and_leaves_the_default_generators_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    steps = steps_of(Numbers(60, buffer=20), batch_size=16, slots=1)
    assert [i - 1000 for i in items(steps, 1)] != items(steps, 0)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_starting_at_any_cursor_gives_the_rest_of_the_same_steps(num_workers: int) -> None:
    whole = steps_of(Numbers(50, buffer=9), batch_size=12, slots=4, num_workers=num_workers)
    for place in range(len(whole)) if not num_workers else (1, 4, 7):
        start = whole[place]["cursor"]
        assert (
            steps_of(Numbers(50, buffer=9), batch_size=12, slots=4, start=start, num_workers=num_workers)
            == whole[place:]
        )


def test_skipped_batches_are_left_out_and_nothing_else() -> None:
    whole = steps_of(Numbers(50), batch_size=12, slots=4, epochs=1)
    for place in range(len(whole)):
        rest = steps_of(Numbers(50), batch_size=12, slots=4, epochs=1, skipped=[Cursor(0, place)])
        assert [step["slots"] for step in rest] == [step["slots"] for n, step in enumerate(whole) if n != place]
        assert rest[-1]["ends"] and rest[-1]["run_ends"]


def test_drop_last_leaves_out_exactly_the_tail() -> None:
    steps = steps_of(Numbers(50), batch_size=12, slots=4, drop_last=True)
    assert items(steps, 0) == list(range(48))
    assert [step["ends"] for step in steps] == [False, False, False, True] * 2


def test_a_stream_that_can_tell_its_place_is_not_read_again() -> None:
    whole = steps_of(Stateful(500), batch_size=10, slots=2, epochs=1)
    windows = StreamWindows(
        samples := StreamSamples(Stateful(500), sharded_by="runtime", batch_size=10, seed=0),
        start=START,
        stop=lambda cursor, steps: False,
        assignment=SlotAssignment(2, 1, 0),
        make_loader=loader(0),
        num_workers=0,
        weigh=None,
        sum_over_ranks=lambda table: table,
    )
    iterator = iter(windows)
    for _ in range(30):
        next(iterator)
    places = dict(windows.reader_states)
    assert places[0].state == {"place": 300}
    source = Stateful(500)
    samples = StreamSamples(source, sharded_by="runtime", batch_size=10, seed=0)
    samples.reader_states = places
    rest = StreamWindows(
        samples,
        start=Cursor(0, 30),
        stop=lambda cursor, steps: cursor.epoch >= 1,
        assignment=SlotAssignment(2, 1, 0),
        make_loader=loader(0),
        num_workers=0,
        weigh=None,
        sum_over_ranks=lambda table: table,
    )
    found = [{m.slot: m.batch.tolist() for m in window.microbatches} for window in rest]
    assert found == [step["slots"] for step in whole[30:]]
    assert source.read == 200


@pytest.mark.parametrize("num_workers", [0, 1, 3])
@pytest.mark.parametrize("size", [5, 24, 50])
def test_a_stream_that_shares_itself_out_is_read_once_and_resumed_on_as_many_workers(
    num_workers: int, size: int
) -> None:
    options: dict[str, Any] = {"batch_size": 12, "slots": 4, "num_workers": num_workers, "sharded_by": "dataset"}
    whole = steps_of(Shares(size), **options)
    for epoch in range(2):
        assert sorted(items(whole, epoch)) == list(range(size))
    for place in range(1, len(whole), 2):
        assert steps_of(Shares(size), start=whole[place]["cursor"], **options) == whole[place:]


def test_the_place_of_a_stream_that_shares_itself_out_is_that_of_its_next_turn() -> None:
    """Only a state of just that place is used; with any other all that lies before would be read again."""
    windows = StreamWindows(
        StreamSamples(StatefulShares(500), sharded_by="dataset", batch_size=10, seed=0),
        start=START,
        stop=lambda cursor, steps: False,
        assignment=SlotAssignment(2, 1, 0),
        make_loader=loader(0),
        num_workers=0,
        weigh=None,
        sum_over_ranks=lambda table: table,
    )
    for _, _ in zip(range(30), windows, strict=False):
        pass
    place = windows.reader_states[0]
    assert (place.epoch, place.number, place.state) == (
        0,
        30 * 2,
        {"place": 300},
    )  # batch 30 begins with turn 60: two slots a batch


@pytest.mark.parametrize("kind", ["tensor", "array", "dict"])
@pytest.mark.parametrize("buffers", [1, 2, 3, 7, 9, 41])
def test_a_stream_that_fills_its_buffers_again_is_read_as_one_of_new_ones(kind: str, buffers: int) -> None:
    def collate(items: list[Any]) -> list[float]:
        return [float(item["number"] if kind == "dict" else item[0]) for item in items]

    source = Refilled(90, buffers, kind)
    samples = StreamSamples(source, sharded_by="runtime", batch_size=4, seed=0, collate=collate)
    pieces = [samples[StreamIndex(Cursor(0, batch), 0, 1, range(1))] for batch in range(23)]
    assert [number for piece in pieces for number in piece.batch] == list(range(90))


@pytest.mark.parametrize("buffers", [1, 2, 3, 8, 13])
def test_yielded_batches_of_buffers_that_are_filled_again_keep_their_values_as_long_as_they_are_held(
    buffers: int,
) -> None:
    samples = StreamSamples(Refilled(60, buffers), sharded_by="runtime", batch_size=2, seed=0, batches=True)
    asked = [StreamIndex(Cursor(0, number // 2), number % 2, 2, range(2)) for number in range(60)]
    held: list[Any] = []
    for index in asked:
        held.append(samples[index].batch)
        last = held[-12:]  # of six global batches, as the training holds them
        assert [float(batch) for batch in last] == list(range(len(held) - len(last), len(held)))


@pytest.mark.parametrize(("num_workers", "slots"), [(2, 1), (5, 1), (3, 2)])
def test_an_epoch_ends_when_every_reader_is_at_its_end(num_workers: int, slots: int) -> None:
    options: dict[str, Any] = {"batch_size": 6, "slots": slots, "num_workers": num_workers, "sharded_by": "dataset"}
    whole = steps_of(UnevenShares(50), **options)
    for epoch in range(2):
        assert sorted(items(whole, epoch)) == list(range(50))
    assert [step["ends"] for step in whole] == [step["next"].batch == 0 for step in whole]
    for place in (1, len(whole) - 1):
        assert steps_of(UnevenShares(50), start=whole[place]["cursor"], **options) == whole[place:]


def test_an_empty_stream_is_named() -> None:
    with pytest.raises(DataError, match="the stream is empty"):
        steps_of(Numbers(0), batch_size=4, slots=1)
