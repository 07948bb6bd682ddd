"""This rank's windows of a stream, whose length is unknown until its end.

Ahead of training, one small all-reduce every few steps shares the number of samples and the weight of each slot. That gives
the global weights, ends an epoch on all ranks after the same step, and detects ranks that read different streams although
each must read all of the same one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from runtime.data.batches import (
    Cursor,
    Microbatch,
    SlotAssignment,
    Weigh,
    Window,
    slots_of_rank,
    weight_of_batch,
    write_weight,
)
from runtime.data.loading import MakeLoader, read
from runtime.data.reading_ahead import Ahead, steps_of, summed_ahead
from runtime.data.stream_comparison import COMPARED, causes, comparison_row, difference, readers_differ
from runtime.data.stream_pieces import FIRST, NOTHING, ReaderState, StreamIndex, StreamItem
from runtime.data.streams import StreamSamples
from runtime.errors import DataError

_AHEAD = 4  # maximum of steps between two all-reduces; 1.5 times as many global batches are held in memory
_READ_AGAIN = (
    "data.train: the stream's load_state_dict did not restore its position (its state lacks something, such as the content "
    "of a shuffle buffer), so the stream is read again from its beginning: the same samples, but resuming takes longer"
)
_EMPTY = "data.train: the stream is empty (or, with data.drop_last, shorter than one global batch)"


class _Row(NamedTuple):
    """One global batch: this rank's pieces, and the totals over all ranks.

    Args:
        readers_differ: this rank's readers read different streams.
        sizes: samples of each slot, over all ranks.
    """

    cursor: Cursor
    pieces: list[StreamItem]
    readers_differ: bool = False
    sizes: list[int] = []
    weight: float | tuple[float, ...] = 0.0

    @property
    def samples(self) -> int:
        return sum(self.sizes)


class StreamWindows:
    """This rank's windows from a cursor on; iterate once. Collective: every rank must iterate alike.

    Args:
        stop: given the cursor and the number of steps yielded so far, returns whether the run's limit is reached.
        skipped: global batches that are read and discarded.
        weigh: returns the weight of a microbatch, given its batch and number of samples; None: the number of samples.
        num_weights: weights of a microbatch; None: a single float.
        sum_over_ranks: sums a float64 tensor over all ranks.
        num_workers: of the loader; 0 reads in this process.
        ahead: steps between two all-reduces, at most four. Default: four.
        notify: called with a line of information for the user.

    Attributes:
        filler: a batch for fillers, with several ranks.
        reader_states: states of this rank's readers after the last yielded window, by worker.

    Raises:
        DataError: the data set raised, a worker died, the stream is empty, or the ranks read different streams.
    """

    def __init__(
        self,
        samples: StreamSamples,
        *,
        start: Cursor,
        stop: Callable[[Cursor, int], bool],
        skipped: Collection[Cursor] = (),
        assignment: SlotAssignment,
        make_loader: MakeLoader,
        num_workers: int,
        weigh: Weigh | None,
        num_weights: int | None = None,
        sum_over_ranks: Callable[[Tensor], Tensor],
        ahead: Ahead = _AHEAD,
        notify: Callable[[str], None] = lambda text: None,
    ) -> None:
        if samples.sharded_by == "dataset" and assignment.slots < assignment.world_size:
            raise DataError(
                f"data.train.sharded_by: dataset needs a slot for each rank, but batch.slots is {assignment.slots} for "
                f"{assignment.world_size} ranks: the data of the other ranks would never be used"
            )
        self._samples, self._start, self._stop, self._num_weights = samples, start, stop, num_weights
        self._skipped, self._assignment, self._weigh, self._sum = frozenset(skipped), assignment, weigh, sum_over_ranks
        self._ahead, self._notify, self._notified = ahead, notify, False
        # If the data set shards itself, its loader workers run out at different rows; each was asked after this many.
        readers, turns = max(1, num_workers), max(1, assignment.slots // assignment.world_size)
        self._max_empty_rounds = 1 if samples.sharded_by == "runtime" else -(-readers // turns)
        self._requests = _Requests(samples, start, assignment, max(1, num_workers))
        self._fetched = read(samples, iter(self._requests), make_loader)
        self.reader_states: dict[int, ReaderState] = {}
        self._prefetched: deque[list[StreamItem]] = deque()  # read while looking for a filler
        self.filler: Any = None
        if assignment.world_size > 1:
            self.filler = self._read_filler()

    def __iter__(self) -> Iterator[Window]:
        cursor, steps = self._start, 0
        while not self._stop(cursor, steps):
            held: _Row | None = None
            for row in self._rows(cursor):
                if row.cursor in self._skipped:
                    continue
                if held is not None:
                    steps += 1
                    run_ends = self._stop(row.cursor, steps)
                    yield self._window(held, row.cursor, run_ends=run_ends)
                    if run_ends:
                        return
                held = row
            cursor = Cursor(cursor.epoch + 1, 0)
            if held is not None:
                steps += 1
                yield self._window(held, cursor, run_ends=self._stop(cursor, steps))

    def _rows(self, start: Cursor) -> Iterator[_Row]:
        """Yield the global batches of an epoch, with the totals over all ranks."""
        self._requests.request_from(start)
        empty, any_samples = 0, start.batch > 0
        for row in summed_ahead(
            self._own_rows(start),
            lambda block: partial(self._with_totals, block),
            lambda: min(_AHEAD, steps_of(self._ahead)),
        ):
            if row.samples:
                empty, any_samples = 0, True
                yield row
                continue
            empty += 1
            if empty == self._max_empty_rounds:
                if not any_samples:
                    raise DataError(_EMPTY)
                return

    def _own_rows(self, start: Cursor) -> Iterator[_Row]:
        """Yield the global batches of an epoch as this rank reads them; endless if only all ranks together know the end."""
        cursor, more, expected = start, True, ""
        while more:
            row = _Row(cursor, self._pieces(cursor))
            if self._samples.sharded_by == "runtime":
                row = row._replace(readers_differ=readers_differ(row.pieces, expected))
                expected = row.pieces[0].next_content
            more = self._samples.sharded_by == "dataset" or row.pieces[0].more
            cursor = Cursor(cursor.epoch, cursor.batch + 1)
            yield row

    def _pieces(self, cursor: Cursor) -> list[StreamItem]:
        if self._prefetched:
            return self._prefetched.popleft()
        return [self._piece(cursor, slot) for slot in self._requests.requested_slots]

    def _piece(self, cursor: Cursor, slot: int) -> StreamItem:
        """Return the reply to a request, dropping replies to requests beyond the end of an epoch."""
        while True:
            piece: StreamItem = next(self._fetched)
            if piece.request.cursor == cursor and piece.request.slot == slot and not piece.request.aligning:
                if piece.read_again and not self._notified:
                    self._notified = True
                    self._notify(_READ_AGAIN)
                return piece

    def _read_filler(self) -> Any:
        if self._samples.sharded_by == "runtime":
            first = self._piece(self._start, FIRST)
            if not first.samples:
                raise DataError(_EMPTY)
            return first.batch
        epoch, batch = self._start
        early, filler = self._search_filler(self._start)
        if filler is not None:
            self._prefetched.extend(early)
        elif batch:  # this rank's part of the epoch is at its end
            _, filler = self._search_filler(Cursor(epoch, 0))
        if filler is None:
            raise DataError(
                f"data.train: rank {self._assignment.rank} has no samples in its part of the stream; "
                "let the data set yield at least one sample on every rank, or let the runtime shard it (sharded_by: runtime)"
            )
        return filler

    def _search_filler(self, start: Cursor) -> tuple[list[list[StreamItem]], Any]:
        """Read from a cursor on until a reader has samples, or all have had a turn; return the pieces read, and a batch."""
        self._requests.request_from(start)
        read_so_far: list[list[StreamItem]] = []
        for number in range(self._max_empty_rounds):
            read_so_far.append(self._pieces(Cursor(start.epoch, start.batch + number)))
            filler = next((piece.batch for piece in read_so_far[-1] if piece.samples), None)
            if filler is not None:
                return read_so_far, filler
        return read_so_far, None

    def _with_totals(self, block: list[_Row]) -> list[_Row]:
        """Fill in the totals over all ranks. Collective."""
        slots, world_size = self._assignment.slots, self._assignment.world_size
        whole = self._samples.sharded_by == "runtime"
        width = self._num_weights or 1
        table = torch.zeros(_AHEAD, slots * (1 + width) + COMPARED, dtype=torch.float64)
        weights = table[:, slots:-COMPARED].view(_AHEAD, slots, width)
        for place, row in enumerate(block):
            for piece in row.pieces:
                if piece.samples:
                    table[place, piece.request.slot] = piece.samples
                    write_weight(weights[place, piece.request.slot], self._weight_of(piece))
            if whole:
                first = row.pieces[0]
                table[place, -COMPARED:] = comparison_row(
                    1.0 + 2 * first.total + first.more, first.content, row.readers_differ
                )
        totals = self._sum(table)
        mismatch = difference(totals, world_size, "streams")
        if mismatch:
            raise DataError(
                f"data.train: {mismatch}, but with sharded_by: runtime every rank must read the whole stream. If the data set "
                f"shards itself, set sharded_by: dataset{causes(mismatch)}"
            )
        return [
            row._replace(
                sizes=[int(size) for size in totals[place, :slots].tolist()],
                weight=weight_of_batch(
                    totals[place, slots:-COMPARED].view(slots, width).sum(0).tolist(), self._num_weights
                ),
            )
            for place, row in enumerate(block)
        ]

    def _weight_of(self, piece: StreamItem) -> float | tuple[float, ...]:
        return float(piece.samples) if self._weigh is None else self._weigh(piece.batch, piece.samples)

    def _window(self, row: _Row, next_cursor: Cursor, *, run_ends: bool) -> Window:
        slots, world_size = self._assignment.slots, self._assignment.world_size
        real = [Microbatch(piece.request.slot, piece.samples, piece.batch) for piece in row.pieces if piece.samples]
        rounds = max(sum(row.sizes[k] > 0 for k in slots_of_rank(slots, world_size, r)) for r in range(world_size))
        fillers = [Microbatch(-1, 0, self.filler)] * (rounds - len(real))
        self._save_reader_states(row)
        return Window(
            row.cursor,
            next_cursor,
            (*real, *fillers),
            row.samples,
            sum(size > 0 for size in row.sizes),
            next_cursor.epoch > row.cursor.epoch,
            run_ends,
            row.weight,
        )

    def _save_reader_states(self, row: _Row) -> None:
        epoch, batch = row.cursor
        for piece in row.pieces:
            if self._samples.sharded_by == "runtime":
                self.reader_states[0] = ReaderState(epoch, batch + 1, piece.state, piece.next_content)
            else:
                own = piece.request.own
                turn = batch * len(own) + piece.request.slot - own.start
                number = turn + self._requests.workers
                self.reader_states[piece.worker] = ReaderState(epoch, number, piece.state, piece.next_content)


class _Requests:
    """Endless requests to the loader; ``request_from`` moves on to another epoch."""

    def __init__(self, samples: StreamSamples, start: Cursor, assignment: SlotAssignment, workers: int) -> None:
        self.workers = workers
        self._own = slots_of_rank(assignment.slots, assignment.world_size, assignment.rank)
        self.requested_slots = list(self._own) or [NOTHING]
        self._slots = assignment.slots
        self._dataset_shards = samples.sharded_by == "dataset"
        self._filler_first = assignment.world_size > 1 and not self._dataset_shards
        self._from, self._turns = start, 0

    def request_from(self, cursor: Cursor) -> None:
        """Request the global batches from a cursor on, from the next request on."""
        if cursor != self._from:
            self._from = cursor
            self._turns += 1

    def __iter__(self) -> Iterator[StreamIndex]:
        count = 0
        if self._filler_first:
            yield StreamIndex(self._from, FIRST, self._slots, self._own)
        while True:
            turns, (epoch, batch) = self._turns, self._from
            while turns == self._turns:
                for number, slot in enumerate(self.requested_slots):
                    index = StreamIndex(Cursor(epoch, batch), slot, self._slots, self._own)
                    # The loader sends requests to its workers in turn; each slot is served by a fixed worker.
                    worker = (batch * len(self._own) + number) % self.workers
                    while self._dataset_shards and count % self.workers != worker:
                        yield index._replace(aligning=True)
                        count += 1
                    yield index
                    count += 1
                    if turns != self._turns:
                        break
                batch += 1
