"""Which items of a stream each step has: every item once an epoch, on 1 to 3 ranks with 0, 1 and 3 workers, also resumed."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist

from runtime.data.batches import Cursor, SlotAssignment
from runtime.data.loading import loader_factory
from runtime.data.stream_pieces import ReaderState
from runtime.data.streams import StreamSamples
from runtime.data.training_data import ReadOptions, StreamedData
from tests.process_pool import ProcessPool
from tests.project.tiny_streams import Numbers, Shares, Stateful, StatefulShares, UnevenShares

SIZE, BATCH, SLOTS, EPOCHS = 50, 12, 6, 2  # four global batches of 12 and one of 2 in an epoch
WORKERS = (0, 1, 3)
SOURCES = {
    "numbers": lambda: Numbers(SIZE, buffer=9),
    "stateful": lambda: Stateful(SIZE),
    "shares": lambda: Shares(SIZE),
    "stateful shares": lambda: StatefulShares(SIZE),
    "uneven shares": lambda: UnevenShares(SIZE),
}

Steps = list[tuple[Cursor, dict[int, list[int]]]]


def steps_of_rank(
    source: str, num_workers: int, start: Cursor, places: Mapping[int, ReaderState], stop_after: int | None
) -> tuple[Steps, Cursor, dict[int, ReaderState]]:
    """Read as a run does: this rank's slots of each step, the cursor behind the last and where the readers stand there."""
    world_size, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    sharded_by: Any = "dataset" if source.endswith("shares") else "runtime"
    how = ReadOptions(
        assignment=SlotAssignment(SLOTS, world_size, rank),
        make_loader=loader_factory(
            num_workers=num_workers, prefetch_factor=2, pin_memory=False, timeout_seconds=0, start_method=None
        ),
        num_workers=num_workers,
        weigh=None,
        begin_sum=lambda table: lambda: summed(table),
    )
    data = StreamedData(StreamSamples(SOURCES[source](), sharded_by=sharded_by, batch_size=BATCH, seed=0))
    reading = data.read(
        how,
        start=start,
        stop=lambda cursor, steps: cursor.epoch >= EPOCHS or steps == stop_after,
        skipped=(),
        reader_states=places,
    )
    steps, cursor = [], start
    for window in reading.windows:
        steps.append((window.cursor, {m.slot: m.batch.tolist() for m in window.microbatches if not m.filler}))
        cursor, places = window.next_cursor, dict(reading.reader_states)
    return steps, cursor, dict(places)


def summed(table: torch.Tensor) -> torch.Tensor:
    if dist.is_initialized():
        dist.all_reduce(table)
    return table


def whole_and_interrupted(source: str) -> list[tuple[Steps, list[Steps]]]:
    """For each number of workers read all of it, and again interrupted within an epoch and on the edge of one."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        dist.init_process_group("gloo")
    warnings.filterwarnings("ignore", "This DataLoader will create")  # three workers on fewer cores
    try:
        found = []
        for num_workers in WORKERS:
            whole, *_ = steps_of_rank(source, num_workers, Cursor(), {}, None)
            parts: list[Steps] = []
            cursor = Cursor()
            places: dict[int, Any] = {}
            for stop_after in (2, 3, None):
                steps, cursor, places = steps_of_rank(source, num_workers, cursor, places, stop_after)
                parts.append(steps)
            found.append((whole, parts))
        return found
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def together(ranks: list[Steps]) -> Steps:
    """Put the slots of all ranks into one step each; no slot is on two ranks."""
    steps = []
    for of_ranks in zip(*ranks, strict=True):
        (cursor,) = {cursor for cursor, _ in of_ranks}
        slots = {slot: ids for _, of_rank in of_ranks for slot, ids in of_rank.items()}
        assert len(slots) == sum(len(of_rank) for _, of_rank in of_ranks)
        steps.append((cursor, dict(sorted(slots.items()))))
    return steps


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("source", SOURCES)
def test_every_item_is_seen_once_an_epoch_also_over_interruptions(
    pool: ProcessPool, source: str, world_size: int
) -> None:
    replies = pool.run(whole_and_interrupted, world_size, source)
    for number, num_workers in enumerate(WORKERS):
        whole = together([reply[number][0] for reply in replies])
        for epoch in range(EPOCHS):
            seen = [i % 1000 for cursor, slots in whole if cursor.epoch == epoch for ids in slots.values() for i in ids]
            assert sorted(seen) == list(range(SIZE)), (num_workers, epoch)
        parts = [together([reply[number][1][part] for reply in replies]) for part in range(3)]
        assert [len(part) for part in parts[:2]] == [2, 3]
        assert [step for part in parts for step in part] == whole, num_workers
        if not source.endswith("shares"):  # the global batches are those of one process without workers
            assert whole == one_process(source)


@cache
def one_process(source: str) -> Steps:
    return together([steps_of_rank(source, 0, Cursor(), {}, None)[0]])
