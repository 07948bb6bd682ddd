"""Streams (``IterableDataset``) read by global batch and slot, so that they can be sharded and resumed exactly.

``sharded_by: runtime``: every reader (each loader worker of each rank) reads the whole stream and keeps its slots. Item i of
an epoch belongs to global batch i // batch size, for any number of ranks and workers. ``sharded_by: dataset``: the data set
gives each reader its own part; reader r of a rank serves every r-th slot that the rank requests, always in the same order.

If the items are whole batches (``yields: batches``), each is one slot, and its samples are its rows.

The seed under which a piece is read depends only on its position, so a reader that starts in the middle draws the same
numbers as one that started at the beginning.

A digest of the next piece is saved with each state. So if the data set's own state is incomplete (a shuffle buffer whose
content is lost), this is detected on resumption and the stream is read again from its beginning; if its content then differs
too, an error is raised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch.utils.data import default_collate, default_convert

from runtime.config.component import described
from runtime.data import worker_info
from runtime.data.copies import AliasGuard, copied
from runtime.data.digests import digest, digest_of_items
from runtime.data.fields import Fields
from runtime.data.samples import SampleFailure, name_of
from runtime.data.stream_pieces import (
    FIRST,
    NOTHING,
    ReaderState,
    ShardedBy,
    StreamBeginning,
    StreamIndex,
    StreamItem,
    fits_json,
)
from runtime.data.yielded_batches import rows_of
from runtime.errors import DataError, LockstepError
from runtime.randomness import Purpose, derive, preserved_random_state, seed_everything

_CPU = torch.device("cpu")
_ROWS_HELD = 8  # most global batches held at once, if yielded batches are not copied
_BEGINNING = 2  # items of each of the two pieces by which a stream is checked before the first step


class _Read(NamedTuple):
    items: list[Any]
    state: Any
    content: str


class StreamSamples:
    """Adapter of a stream for the loader: indexed by :class:`StreamIndex`, returns one :class:`StreamItem`.

    Args:
        source: the user's IterableDataset; ``set_epoch``, ``state_dict`` and ``load_state_dict`` are used if it has them.
        batch_size: items of a global batch.
        batches: each item is a whole batch, and no slot has more than one.
        fields: roles of a batch's parts, for counting the samples of a yielded batch.
        drop_last: leave out an epoch's last, smaller global batch.

    Attributes:
        reader_states: where to resume, by worker.
        may_differ: accept a stream whose content differs from when the run was saved.
    """

    may_differ = False

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
        batches: bool = False,
        fields: Fields = Fields(),  # noqa: B008 - frozen
    ) -> None:
        self.source, self.sharded_by, self.batch_size, self.batches = source, sharded_by, batch_size, batches
        self._fields = fields
        self.reader_states: dict[int, ReaderState] = {}
        self._drop_last = drop_last
        self._seed = seed
        self._transform = transform
        self._collate = collate or default_collate
        self._stateful = hasattr(source, "state_dict") and hasattr(source, "load_state_dict")
        self._iterator: Iterator[Any] = iter(())
        self._guard = AliasGuard((_ROWS_HELD if batches else 2) * batch_size)  # 2: this batch and the next
        self._epoch, self._next = -1, 0
        self._current = self._ahead = _Read([], None, "")
        self._initial = deepcopy(source.state_dict()) if self._stateful else None
        self._ended = False  # iterated to its end: the data set is then at the beginning of this epoch or the next
        self._expected: ReaderState | None = None
        self._read_again = False

    @property
    def own_batches(self) -> bool:
        """See :class:`runtime.data.samples.Samples`."""
        return self._collate is not default_collate

    def name_of(self, stage: str) -> str:
        """See :class:`runtime.data.samples.Samples`."""
        return name_of(stage, self.source, self._transform, self._collate)

    def __getitem__(self, index: StreamIndex) -> Any:
        return self.__getitems__(index)

    def __getitems__(self, index: StreamIndex) -> StreamItem | SampleFailure:
        """Return one piece, or a failure if reading raised."""
        if index.aligning:
            return StreamItem(index)
        worker, workers = worker_info.reader()
        try:
            with self._worker_hidden():
                if self.sharded_by == "runtime":
                    return self._whole_batch(index, worker)
                return self._own_piece(index, worker, workers)
        except LockstepError as error:
            return SampleFailure(str(error))
        except Exception as error:
            return SampleFailure(f"preparing samples of the stream raised {described(error)}")

    def _whole_batch(self, index: StreamIndex, worker: int) -> StreamItem:
        epoch, batch = index.cursor
        if epoch != self._epoch or batch < self._next - 2:
            state = self.reader_states.get(worker, self.reader_states.get(0))
            self._current = self._opened(epoch, batch, self.batch_size, state)
            self._ahead = self._read(epoch, self._next, self.batch_size)
        while self._next - 2 < batch and self._current.items:
            self._current, self._ahead = self._ahead, self._read(epoch, self._next, self.batch_size)
        items, state, content = self._current
        if self._drop_last and len(items) < self.batch_size:
            items = []
        positions = self._positions(index, len(items))
        samples, collated = self._batch_of(epoch, batch * self.batch_size, [(i, items[i]) for i in positions])
        more = len(self._ahead.items) >= (self.batch_size if self._drop_last else 1)
        following = self._ahead.content
        return StreamItem(
            index, samples, collated, len(items), more, worker, state, content, following, self._read_again
        )

    def _own_piece(self, index: StreamIndex, worker: int, workers: int) -> StreamItem:
        epoch, batch = index.cursor
        turn = batch * len(index.own) + index.slot - index.own.start
        if epoch != self._epoch or turn < self._next - 2 * workers:
            # This reader has only every workers-th turn.
            first = turn % workers
            self._current = self._opened(
                epoch, turn, self._size(index, turn), self.reader_states.get(worker), first=first, step=workers
            )
            self._ahead = self._read(epoch, self._next, self._size(index, self._next), step=workers)
        while self._next - 2 * workers < turn:
            ahead = self._read(epoch, self._next, self._size(index, self._next), step=workers)
            self._current, self._ahead = self._ahead, ahead
        items, state, content = self._current
        start = batch * self.batch_size + _bounds(self.batch_size, index.slots, index.slot)[0]
        samples, collated = self._batch_of(epoch, start, list(enumerate(items)))
        following = self._ahead.content
        return StreamItem(
            index, samples, collated, len(items), False, worker, state, content, following, self._read_again
        )

    def _size(self, index: StreamIndex, turn: int) -> int:
        slot = index.own.start + turn % len(index.own)
        start, stop = _bounds(self.batch_size, index.slots, slot)
        return stop - start

    def _opened(
        self, epoch: int, number: int, size: int, saved: ReaderState | None, *, first: int = 0, step: int = 1
    ) -> _Read:
        """Begin an epoch's iteration and read the first piece: at the saved state if that is complete, else at the beginning.

        Args:
            number: of the requested piece.
            first: number of the reader's first piece.
            step: from one of its pieces to the next.
        """
        self._read_again = False
        self._expected = saved if saved is not None and saved.epoch == epoch and saved.content else None
        if saved is not None and saved.state is not None and (saved.epoch, saved.number) == (epoch, number):
            self._begin(epoch, number, saved.state)
            piece = self._read(epoch, number, size, step=step, checked=False)
            if saved.content in ("", piece.content):
                return piece
            self._begin(epoch, first)  # the state is incomplete
            self._read_again = True
        else:
            self._begin(epoch, first)
            self._read_again = self._stateful and saved is not None and number > first  # JSON could not hold the state
        return self._read(epoch, first, size, step=step)

    def beginning(self, *, with_state: bool) -> StreamBeginning:
        """Read the first items under their seeds; this object must not be used for anything else.

        Raises:
            Exception: whatever reading or the user's transform or collate function raises.
        """
        with self._worker_hidden(), preserved_random_state(_CPU):
            self._begin(0, 0)
            first, second = (self._read(0, number, _BEGINNING) for number in range(2))
            items = [*first.items, *second.items]
            yielded, changed = digest(items), self._transformed(0, 0, list(enumerate(map(copied, items))))
            transformed = digest(changed)
            groups = [[item] for item in changed] if self.batches else [changed] if changed else []
            collated = digest([self._finished(group, 0, 0) for group in groups])
            fault = self._state_fault(first.state, second) if with_state else ""
            return StreamBeginning(yielded, transformed, collated, fault)

    def _state_fault(self, state: Any, following: _Read) -> str:
        """Return why loading ``state`` does not lead to the ``following`` items; empty if it does or there is no state."""
        if not self._stateful or len(following.items) < _BEGINNING:
            return ""
        if not fits_json(state):
            return "cannot be stored as JSON"
        self._begin(0, 1, deepcopy(state))
        again = self._read(0, 1, _BEGINNING)
        return "" if digest(again.items) == digest(following.items) else "is incomplete"

    def _worker_hidden(self) -> AbstractContextManager[None]:
        return worker_info.hidden() if self.sharded_by == "runtime" else nullcontext()

    def _begin(self, epoch: int, number: int, state: Any = None) -> None:
        """Begin an iteration at a state, or at the start of an epoch."""
        if hasattr(self.source, "set_epoch"):
            self.source.set_epoch(epoch)
        if state is not None:
            self.source.load_state_dict(state)
        elif self._stateful and not (self._ended and epoch > self._epoch) and not _same(self.source, self._initial):
            self.source.load_state_dict(self._initial)  # a check or a rollback left it in the middle
        self._epoch, self._next, self._guard = epoch, number, self._guard.for_new_iteration()
        with preserved_random_state(_CPU):
            seed_everything(derive(self._seed, Purpose.STREAM, epoch, number), _CPU)
            self._iterator = iter(self.source)

    def _read(self, epoch: int, number: int, size: int, *, step: int = 1, checked: bool = True) -> _Read:
        with preserved_random_state(_CPU):
            seed_everything(derive(self._seed, Purpose.STREAM, epoch, number), _CPU)
            try:
                items = self._guard.take(self._iterator, size)
                # Copied: the data set may modify the returned object, and the next piece is read before this is used.
                state = deepcopy(self.source.state_dict()) if self._stateful else None
            except Exception as error:
                reader = worker_info.reader()[0]
                what = "global batch" if self.sharded_by == "runtime" else f"worker {reader}'s slot"
                where = f"{what} {number + 1} of epoch {epoch + 1}"
                raise DataError(f"reading {where} from the stream raised {described(error)}") from error
        self._next = number + step
        self._ended = len(items) < size
        content = digest_of_items(items)
        if checked and self._expected is not None and number == self._expected.number:
            self._check(content, self._expected)
        return _Read(items, state, content)

    def _check(self, content: str, expected: ReaderState) -> None:
        """Check that the stream's content is the same as when the state was saved.

        Raises:
            DataError: it is not.
        """
        if content != expected.content and not self.may_differ:
            what = "global batch" if self.sharded_by == "runtime" else "piece"
            raise DataError(
                f"the stream {type(self.source).__name__} does not repeat itself: {what} {expected.number + 1} of epoch "
                f"{expected.epoch + 1} is not what this run would have read next when it was saved. Its data changed, or it "
                "uses a private random generator or the clock: let it draw from Python's, NumPy's or torch's global generator, "
                "which are seeded for each batch. To resume anyway: resume.allow_changes: [data]"
            )

    def _positions(self, index: StreamIndex, count: int) -> range:
        if index.slot == NOTHING or not count:
            return range(0)
        slots, slot = (min(index.slots, count), 0) if index.slot == FIRST else (index.slots, index.slot)
        return range(*_bounds(count, slots, slot))

    def _batch_of(self, epoch: int, first: int, items: list[tuple[int, Any]]) -> tuple[int, Any]:
        """Return the number of samples in some items, and the batch made of them; (0, None) without items.

        Args:
            first: number in the epoch of the item at position 0.
            items: with their positions.
        """
        if not items:
            return 0, None
        if self._transform is None and self._collate is default_collate:
            return self._finished([item for _, item in items], epoch, first + items[0][0])
        with preserved_random_state(_CPU):
            return self._finished(self._transformed(epoch, first, items), epoch, first + items[0][0])

    def _transformed(self, epoch: int, first: int, items: list[tuple[int, Any]]) -> list[Any]:
        """Return the transformed items, each under its seed; the last one's random state stays set."""
        transformed = []
        for position, item in items:
            seed_everything(derive(self._seed, Purpose.SAMPLE, epoch, first + position), _CPU)
            transformed.append(item if self._transform is None else self._transform(item))
        return transformed

    def _finished(self, items: list[Any], epoch: int, number: int) -> tuple[int, Any]:
        if not self.batches:
            try:
                return len(items), self._collate(items)
            except Exception as error:
                if self._collate is not default_collate:
                    raise
                raise DataError(
                    f"collating {len(items)} samples of the stream raised {described(error)}\n  give data.collate; or, if the "
                    "stream yields whole batches, set yields: batches next to sharded_by"
                ) from error
        (item,) = items
        batch = default_convert(item)  # type: ignore[no-untyped-call]
        try:
            return rows_of(batch, self._fields), batch
        except DataError as error:
            raise DataError(f"batch {number + 1} of epoch {epoch + 1} of the stream: {error}") from error


def _bounds(count: int, slots: int, slot: int) -> tuple[int, int]:
    """Return start and end of a slot in a global batch, as in :func:`runtime.data.batches.slot_slice`."""
    return count * slot // slots, count * (slot + 1) // slots


def _same(source: Any, state: Any) -> bool:
    try:
        return bool(source.state_dict() == state)
    except Exception:  # comparing arrays, for example
        return False
