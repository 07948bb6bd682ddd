"""Streams (``IterableDataset``) read by global batch and slot, so that they can be shared out, resumed and kept exact.

``sharded_by: runtime``: every reader (each loader worker of each rank) reads the whole stream and keeps its slots. Item i of
an epoch belongs to global batch i // batch size, for any number of ranks and workers. ``sharded_by: dataset``: the data set
gives each reader its own share; reader r of a rank serves every r-th slot that the rank asks for, always in the same order.

The random state under which a piece is read follows from its place, so a reader that starts anywhere draws what one that
came from the beginning would have drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, Literal, NamedTuple

import torch
from torch.utils.data import default_collate, get_worker_info

from runtime.config.component import described
from runtime.data.batches import Cursor
from runtime.data.samples import SampleFailure
from runtime.errors import DataError, LockstepError
from runtime.randomness import Purpose, derive, preserved_random_state, seed_everything

ShardedBy = Literal["runtime", "dataset"]

FIRST, NOTHING = -1, -2
"""In place of a slot: the batch's first samples, for fillers; nothing but the counts."""

_CPU = torch.device("cpu")


class StreamIndex(NamedTuple):
    """What a loader's worker is asked for.

    Args:
        slot: its number, or FIRST or NOTHING.
        slots: K.
        own: the rank's slots; they are asked for in turn.
        aligning: asked only so that the next question reaches the worker that it belongs to.
    """

    cursor: Cursor
    slot: int
    slots: int
    own: range
    aligning: bool = False


class Piece(NamedTuple):
    """What comes back.

    Args:
        asked: what was asked for.
        samples: in ``batch``.
        batch: collated; None if there are no samples.
        total: samples of the whole global batch, where the runtime shards; else of the piece.
        more: whether another global batch follows in the epoch, where the runtime shards.
        worker: which reader of the rank it was.
        state: the data set's own state behind the global batch (behind the piece, where the data set shards).
    """

    asked: StreamIndex
    samples: int = 0
    batch: Any = None
    total: int = 0
    more: bool = False
    worker: int = 0
    state: Any = None


class Place(NamedTuple):
    """A state of the data set's own, and the global batch (or the reader's turn) that comes after it."""

    epoch: int
    number: int
    state: Any


class _Read(NamedTuple):
    items: list[Any]
    state: Any


class StreamSamples:
    """A stream as the loader sees it: indexed by :class:`StreamIndex`, giving one :class:`Piece`.

    Args:
        source: the user's IterableDataset; ``set_epoch``, ``state_dict`` and ``load_state_dict`` are used if it has them.
        batch_size: samples of a global batch.
        drop_last: leave out an epoch's last, smaller global batch.

    Attributes:
        places: where readers can start without reading what lies before, by worker.
    """

    def __init__(
        self,
        source: Any,
        *,
        sharded_by: ShardedBy,
        batch_size: int,
        seed: int,
        drop_last: bool = False,
        transform: Callable[[Any], Any] | None = None,
        collate: Callable[[list[Any]], Any] | None = None,
    ) -> None:
        self.source, self.sharded_by, self.batch_size = source, sharded_by, batch_size
        self.places: dict[int, Place] = {}
        self._drop_last = drop_last
        self._seed = seed
        self._transform = transform
        self._collate = collate or default_collate
        self._stateful = hasattr(source, "state_dict") and hasattr(source, "load_state_dict")
        self._iterator: Iterator[Any] = iter(())
        self._epoch, self._next = -1, 0
        self._current = self._ahead = _Read([], None)

    def __getitem__(self, index: StreamIndex) -> Any:
        return self.__getitems__(index)

    def __getitems__(self, index: StreamIndex) -> Piece | SampleFailure:
        """Return one piece, or the failure that kept it from being read."""
        try:
            if index.aligning:
                return Piece(index)
            return self._whole_batch(index) if self.sharded_by == "runtime" else self._own_piece(index)
        except LockstepError as error:
            return SampleFailure(str(error))
        except Exception as error:
            return SampleFailure(f"preparing samples of the stream raised {described(error)}")

    def _whole_batch(self, index: StreamIndex) -> Piece:
        epoch, batch = index.cursor
        if epoch != self._epoch or batch < self._next - 2:
            first = self._open(epoch, batch)
            self._current = self._read(epoch, first, self.batch_size)
            self._ahead = self._read(epoch, first + 1, self.batch_size)
        while self._next - 2 < batch and self._current.items:
            self._current, self._ahead = self._ahead, self._read(epoch, self._next, self.batch_size)
        items, state = self._current
        if self._drop_last and len(items) < self.batch_size:
            items = []
        positions = self._positions(index, len(items))
        chosen = self._collated(epoch, batch * self.batch_size, [(i, items[i]) for i in positions])
        more = len(self._ahead.items) >= (self.batch_size if self._drop_last else 1)
        return Piece(index, len(positions), chosen, len(items), more, _worker(), state)

    def _own_piece(self, index: StreamIndex) -> Piece:
        epoch, batch = index.cursor
        turn = batch * len(index.own) + index.slot - index.own.start
        worker, workers = _worker(), _workers()
        if epoch != self._epoch or turn < self._next:
            first = self._open(epoch, turn)
            # Only every so many turns are this reader's.
            self._next = first if first == turn else turn % workers
        while self._next < turn:
            self._read(epoch, self._next, self._size(index, self._next), step=workers)
        items, state = self._read(epoch, turn, self._size(index, turn), step=workers)
        start = batch * self.batch_size + _bounds(self.batch_size, index.slots, index.slot)[0]
        collated = self._collated(epoch, start, list(enumerate(items)))
        return Piece(index, len(items), collated, len(items), False, worker, state)

    def _size(self, index: StreamIndex, turn: int) -> int:
        slot = index.own.start + turn % len(index.own)
        start, stop = _bounds(self.batch_size, index.slots, slot)
        return stop - start

    def _open(self, epoch: int, number: int) -> int:
        """Begin an epoch's iteration; return the number of the piece that is read next."""
        place = self.places.get(_worker(), self.places.get(0) if self.sharded_by == "runtime" else None)
        known = place if place is not None and (place.epoch, place.number) == (epoch, number) else None
        if hasattr(self.source, "set_epoch"):
            self.source.set_epoch(epoch)
        if known is not None:
            self.source.load_state_dict(known.state)
        self._epoch, self._next = epoch, known.number if known is not None else 0
        with preserved_random_state(_CPU):
            seed_everything(derive(self._seed, Purpose.STREAM, epoch, self._next), _CPU)
            self._iterator = iter(self.source)
        return self._next

    def _read(self, epoch: int, number: int, size: int, *, step: int = 1) -> _Read:
        with preserved_random_state(_CPU):
            seed_everything(derive(self._seed, Purpose.STREAM, epoch, number), _CPU)
            try:
                items = list(islice(self._iterator, size))
                state = self.source.state_dict() if self._stateful else None
            except Exception as error:
                what = "global batch" if self.sharded_by == "runtime" else f"worker {_worker()}'s slot"
                where = f"{what} {number + 1} of epoch {epoch + 1}"
                raise DataError(f"reading {where} from the stream raised {described(error)}") from error
        self._next = number + step
        return _Read(items, state)

    def _positions(self, index: StreamIndex, count: int) -> range:
        if index.slot == NOTHING or not count:
            return range(0)
        slots, slot = (min(index.slots, count), 0) if index.slot == FIRST else (index.slots, index.slot)
        return range(*_bounds(count, slots, slot))

    def _collated(self, epoch: int, first: int, items: list[tuple[int, Any]]) -> Any:
        if not items:
            return None
        if self._transform is None:
            return self._collate([item for _, item in items])
        with preserved_random_state(_CPU):
            samples = []
            for position, item in items:
                seed_everything(derive(self._seed, Purpose.SAMPLE, epoch, first + position), _CPU)
                samples.append(self._transform(item))
            return self._collate(samples)


def _bounds(count: int, slots: int, slot: int) -> tuple[int, int]:
    """Return where a slot begins and ends in a global batch, as :func:`runtime.data.batches.cut` cuts it."""
    return count * slot // slots, count * (slot + 1) // slots


def _worker() -> int:
    info = get_worker_info()
    return 0 if info is None else info.id


def _workers() -> int:
    info = get_worker_info()
    return 1 if info is None else info.num_workers
