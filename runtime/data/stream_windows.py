"""This rank's windows of a stream, whose length nobody knows before its end.

Ahead of the training the ranks tell each other, in one small all-reduce every few steps, how many samples and how much weight
each slot has. That gives the global weights, ends an epoch on all ranks after the same step, and shows when ranks read
different streams though each was to read all of one.
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
    note_weight,
    slots_of_rank,
    weight_of_batch,
)
from runtime.data.loading import MakeLoader, read
from runtime.data.reading_ahead import Ahead, steps_of, summed_ahead
from runtime.data.stream_comparison import SHOWN, causes, difference, readers_differ, shown_to_all
from runtime.data.stream_pieces import FIRST, NOTHING, ReaderState, StreamIndex, StreamItem
from runtime.data.streams import StreamSamples
from runtime.errors import DataError

_AHEAD = 4  # most steps between two all-reduces; one and a half times as many global batches are held
_READ_AGAIN = (
    "data.train: what the stream's load_state_dict leads to is not what comes next (its state lacks something, such as the "
    "content of a shuffle buffer), so the stream is read again from its beginning: the same samples, later"
)
_EMPTY = "data.train: there is nothing in the stream (or, with data.drop_last, less than one global batch)"


class _Row(NamedTuple):
    """One global batch as this rank has it, and as all have it together.

    Args:
        readers_differ: this rank's readers read different streams.
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
        stop: told the cursor and the number of steps yielded so far, whether the run's limit is reached.
        skipped: global batches that are read and left out.
        weigh: returns the weight of a microbatch of so many samples; None if it is the number of samples.
        num_weights: how many weights a microbatch has; None: one, as a number.
        sum_over_ranks: sums a float64 tensor over all ranks.
        num_workers: of the loader; 0 reads in this process.
        ahead: steps between two all-reduces, four at most. Default: four.
        tell: takes a line that informs.

    Attributes:
        filler: a batch for fillers, with several ranks.
        places: where this rank's readers stand behind the window that was yielded last, if the data set can tell.

    Raises:
        DataError: the data set raised, a worker died, there is nothing in the stream, or the ranks read different ones.
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
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        if samples.sharded_by == "dataset" and assignment.slots < assignment.world_size:
            raise DataError(
                f"data.train.sharded_by: dataset needs a slot for each rank, and batch.slots is {assignment.slots} for "
                f"{assignment.world_size} ranks: what the others read would never be trained on"
            )
        self._samples, self._start, self._stop, self._num_weights = samples, start, stop, num_weights
        self._skipped, self._assignment, self._weigh, self._sum = frozenset(skipped), assignment, weigh, sum_over_ranks
        self._ahead, self._tell, self._told = ahead, tell, False
        # Where the data set shards itself, readers end at different turns: each has had one in so many rows.
        readers, turns = max(1, num_workers), max(1, assignment.slots // assignment.world_size)
        self._most_empty = 1 if samples.sharded_by == "runtime" else -(-readers // turns)
        self._questions = _Requests(samples, start, assignment, max(1, num_workers))
        self._fetched = read(samples, iter(self._questions), make_loader)
        self.places: dict[int, ReaderState] = {}
        self._early: deque[list[StreamItem]] = deque()  # read before they are asked for
        self.filler: Any = None
        if assignment.world_size > 1:
            self.filler = self._made_filler()

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
        """Yield the global batches of an epoch, each known to all ranks."""
        self._questions.turn_to(start)
        empty, any_samples = 0, start.batch > 0
        for row in summed_ahead(
            self._own_rows(start),
            lambda block: partial(self._known_to_all, block),
            lambda: min(_AHEAD, steps_of(self._ahead)),
        ):
            if row.samples:
                empty, any_samples = 0, True
                yield row
                continue
            empty += 1
            if empty == self._most_empty:
                if not any_samples:
                    raise DataError(_EMPTY)
                return

    def _own_rows(self, start: Cursor) -> Iterator[_Row]:
        """Yield the global batches of an epoch as this rank reads them, without end where only all ranks know the end."""
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
        if self._early:
            return self._early.popleft()
        return [self._piece(cursor, slot) for slot in self._questions.slots_asked]

    def _piece(self, cursor: Cursor, slot: int) -> StreamItem:
        """Return the answer to a question; what was asked ahead of an epoch's end is passed over."""
        while True:
            piece: StreamItem = next(self._fetched)
            if piece.asked.cursor == cursor and piece.asked.slot == slot and not piece.asked.aligning:
                if piece.read_again and not self._told:
                    self._told = True
                    self._tell(_READ_AGAIN)
                return piece

    def _made_filler(self) -> Any:
        if self._samples.sharded_by == "runtime":
            first = self._piece(self._start, FIRST)
            if not first.samples:
                raise DataError(_EMPTY)
            return first.batch
        epoch, batch = self._start
        early, filler = self._found_filler(self._start)
        if filler is not None:
            self._early.extend(early)
        elif batch:  # this rank's share of the epoch is at its end
            _, filler = self._found_filler(Cursor(epoch, 0))
        if filler is None:
            raise DataError(
                f"data.train: rank {self._assignment.rank} has no samples in its share of the stream; "
                "let the data set give every rank some, or let the runtime shard it (sharded_by: runtime)"
            )
        return filler

    def _found_filler(self, start: Cursor) -> tuple[list[list[StreamItem]], Any]:
        """Read from a cursor on until a reader has samples, or all have had a turn; return what was read, and a batch."""
        self._questions.turn_to(start)
        read_so_far: list[list[StreamItem]] = []
        for number in range(self._most_empty):
            read_so_far.append(self._pieces(Cursor(start.epoch, start.batch + number)))
            filler = next((piece.batch for piece in read_so_far[-1] if piece.samples), None)
            if filler is not None:
                return read_so_far, filler
        return read_so_far, None

    def _known_to_all(self, block: list[_Row]) -> list[_Row]:
        """Fill in what all ranks have together. Collective."""
        slots, world_size = self._assignment.slots, self._assignment.world_size
        whole = self._samples.sharded_by == "runtime"
        width = self._num_weights or 1
        table = torch.zeros(_AHEAD, slots * (1 + width) + SHOWN, dtype=torch.float64)
        weights = table[:, slots:-SHOWN].view(_AHEAD, slots, width)
        for place, row in enumerate(block):
            for piece in row.pieces:
                if piece.samples:
                    table[place, piece.asked.slot] = piece.samples
                    note_weight(weights[place, piece.asked.slot], self._weight_of(piece))
            if whole:
                first = row.pieces[0]
                table[place, -SHOWN:] = shown_to_all(
                    1.0 + 2 * first.total + first.more, first.content, row.readers_differ
                )
        together = self._sum(table)
        what = difference(together, world_size, "streams")
        if what:
            raise DataError(
                f"data.train: {what}, though each was to read all of one (sharded_by: runtime). If the data set gives each its "
                f"own share, say sharded_by: dataset{causes(what)}"
            )
        return [
            row._replace(
                sizes=[int(size) for size in together[place, :slots].tolist()],
                weight=weight_of_batch(
                    together[place, slots:-SHOWN].view(slots, width).sum(0).tolist(), self._num_weights
                ),
            )
            for place, row in enumerate(block)
        ]

    def _weight_of(self, piece: StreamItem) -> float | tuple[float, ...]:
        return float(piece.samples) if self._weigh is None else self._weigh(piece.batch, piece.samples)

    def _window(self, row: _Row, next_cursor: Cursor, *, run_ends: bool) -> Window:
        slots, world_size = self._assignment.slots, self._assignment.world_size
        real = [Microbatch(piece.asked.slot, piece.samples, piece.batch) for piece in row.pieces if piece.samples]
        rounds = max(sum(row.sizes[k] > 0 for k in slots_of_rank(slots, world_size, r)) for r in range(world_size))
        fillers = [Microbatch(-1, 0, self.filler)] * (rounds - len(real))
        self._note_places(row)
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

    def _note_places(self, row: _Row) -> None:
        epoch, batch = row.cursor
        for piece in row.pieces:
            if self._samples.sharded_by == "runtime":
                self.places[0] = ReaderState(epoch, batch + 1, piece.state, piece.next_content)
            else:
                own = piece.asked.own
                turn = batch * len(own) + piece.asked.slot - own.start
                number = turn + self._questions.workers
                self.places[piece.worker] = ReaderState(epoch, number, piece.state, piece.next_content)


class _Requests:
    """What the loader is asked for, without end; told where the next epoch begins, it turns to it."""

    def __init__(self, samples: StreamSamples, start: Cursor, assignment: SlotAssignment, workers: int) -> None:
        self.workers = workers
        self._own = slots_of_rank(assignment.slots, assignment.world_size, assignment.rank)
        self.slots_asked = list(self._own) or [NOTHING]
        self._slots = assignment.slots
        self._dataset_shards = samples.sharded_by == "dataset"
        self._filler_first = assignment.world_size > 1 and not self._dataset_shards
        self._from, self._turns = start, 0

    def turn_to(self, cursor: Cursor) -> None:
        """Ask for the global batches from a cursor on, from the next question on."""
        if cursor != self._from:
            self._from = cursor
            self._turns += 1

    def __iter__(self) -> Iterator[StreamIndex]:
        asked = 0
        if self._filler_first:
            yield StreamIndex(self._from, FIRST, self._slots, self._own)
        while True:
            turns, (epoch, batch) = self._turns, self._from
            while turns == self._turns:
                for number, slot in enumerate(self.slots_asked):
                    index = StreamIndex(Cursor(epoch, batch), slot, self._slots, self._own)
                    # The loader asks its workers in turn; each slot has a worker that it belongs to.
                    belongs_to = (batch * len(self._own) + number) % self.workers
                    while self._dataset_shards and asked % self.workers != belongs_to:
                        yield index._replace(aligning=True)
                        asked += 1
                    yield index
                    asked += 1
                    if turns != self._turns:
                        break
                batch += 1
