"""What a run trains on, mapped or streamed: its global batches from any cursor on, and what is known of them beforehand."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch

from runtime.data.batches import BeginSum, Cursor, SlotAssignment, Weigh, Window, Windows, upcoming, with_weights
from runtime.data.batching import BudgetOrder
from runtime.data.loading import MakeLoader, read, read_here
from runtime.data.order import Order
from runtime.data.reading_ahead import Ahead
from runtime.data.samples import Samples, SlotIndex, fingerprint
from runtime.data.stream_pieces import FIRST, ReaderState, ShardedBy, StreamIndex, fits_json
from runtime.data.stream_windows import StreamWindows
from runtime.data.streams import StreamSamples
from runtime.distributed.collectives import gather_bytes
from runtime.errors import DataError


@dataclass(frozen=True)
class WindowReader:
    """This rank's windows, being read.

    Args:
        windows: with their weights. Collective: every rank must iterate alike.
        filler: a batch for fillers, with several ranks.
        places: by worker, where a stream's readers stand behind the last window; empty where nothing is known.
    """

    windows: Iterator[Window]
    filler: Any
    places: Mapping[int, ReaderState] = field(default_factory=dict)


@dataclass(frozen=True)
class ReadOptions:
    """How windows are read and weighed.

    Args:
        num_workers: of the loader.
        weigh: weight of one microbatch of so many samples; None if it is the number of samples.
        num_weights: how many weights a microbatch has; None: one, as a number.
        begin_sum: begins to sum a float64 tensor over all ranks. Collective.
        ahead: over how many steps weights are to be summed at once; equal on all ranks.
        tell: takes a line that informs.
    """

    assignment: SlotAssignment
    make_loader: MakeLoader
    num_workers: int
    weigh: Weigh | None
    begin_sum: BeginSum
    num_weights: int | None = None
    ahead: Ahead = 8
    tell: Callable[[str], None] = lambda text: None


class MappedData:
    """A map-style data set in an order."""

    def __init__(self, samples: Samples, order: Order) -> None:
        self.samples, self.order = samples, order

    @property
    def num_samples(self) -> int | None:
        """Samples of the data set; None where nobody knows."""
        return len(self.samples)

    @property
    def steps_per_epoch(self) -> int | None:
        """Global batches of the first epoch; None where nobody knows."""
        return self.order.num_batches(0)

    def num_steps(self, epochs: int) -> int | None:
        """Global batches of so many epochs, which may differ in length; None where nobody knows."""
        if isinstance(self.order, BudgetOrder):  # others differ only by a user's own sampler
            return sum(self.order.num_batches(epoch) for epoch in range(epochs))
        return epochs * self.order.num_batches(0)

    @property
    def smallest_batch(self) -> int:
        """Samples of the first epoch's smallest global batch, as far as is known."""
        last = self.order.num_batches(0) - 1
        first = 0 if isinstance(self.order, BudgetOrder) else last
        return min(len(self.order.batch(0, index)) for index in range(first, last + 1))

    def fingerprint(self, assignment: tuple[int, int]) -> dict[str, Any]:
        """Return what must be the same on resumption, given ranks and workers."""
        return fingerprint(self.samples.source)

    def upcoming(self, cursor: Cursor, skipped: Collection[Cursor]) -> Cursor:
        """Return the first global batch from a cursor on that is not left out."""
        return upcoming(self.order, cursor, skipped)

    def first_batch(self, size: int) -> Any:
        """Return the run's first samples, collated."""
        return next(read(self.samples, iter([SlotIndex(0, self.order.batch(0, 0)[:size])]), read_here))

    def read(
        self,
        options: ReadOptions,
        *,
        start: Cursor,
        stop: Callable[[Cursor, int], bool],
        skipped: Collection[Cursor],
        places: Mapping[int, ReaderState],
    ) -> WindowReader:
        """Begin to read from a cursor on."""
        windows = Windows(
            self.samples,
            self.order,
            start=start,
            stop=stop,
            skipped=skipped,
            assignment=options.assignment,
            make_loader=options.make_loader,
        )
        weighed = iter(windows)
        if options.weigh is not None:
            weighed = with_weights(
                weighed,
                weigh=options.weigh,
                num_weights=options.num_weights,
                slots=options.assignment.slots,
                begin_sum=options.begin_sum if options.assignment.world_size > 1 else None,
                ahead=options.ahead,
            )
        return WindowReader(weighed, windows.filler)


class StreamedData:
    """An IterableDataset, in its own order."""

    num_samples: int | None = None
    steps_per_epoch: int | None = None
    smallest_batch = 1

    def num_steps(self, epochs: int) -> int | None:
        """See :class:`MappedData`."""
        return None

    def __init__(self, samples: StreamSamples) -> None:
        self.samples = samples

    def fingerprint(self, assignment: tuple[int, int]) -> dict[str, Any]:
        """See :class:`MappedData`. Where the data set shards itself, its shares follow from ranks and workers."""
        source = self.samples.source
        told = {"samples": None, "id": getattr(source, "fingerprint", None)}
        if self.samples.sharded_by == "dataset":
            told |= {"ranks": assignment[0], "workers": max(1, assignment[1])}
        return told

    def upcoming(self, cursor: Cursor, skipped: Collection[Cursor]) -> Cursor:
        """Return the cursor itself: what comes after it shows when it is read."""
        return cursor

    def first_batch(self, size: int) -> Any:
        """See :class:`MappedData`; from a reader of its own, so that nothing is used up."""
        slots = -(-self.samples.batch_size // size)
        slot = FIRST if self.samples.sharded_by == "runtime" else 0
        piece = next(read(copy(self.samples), iter([StreamIndex(Cursor(), slot, slots, range(slots))]), read_here))
        if not piece.samples:
            raise DataError(
                "data.train: there are not enough samples in the stream to try what fits (batch.micro_size: auto)"
            )
        return piece.batch

    def read(
        self,
        options: ReadOptions,
        *,
        start: Cursor,
        stop: Callable[[Cursor, int], bool],
        skipped: Collection[Cursor],
        places: Mapping[int, ReaderState],
    ) -> WindowReader:
        """See :class:`MappedData`."""
        self.samples.places = dict(places)
        windows = StreamWindows(
            self.samples,
            start=start,
            stop=stop,
            skipped=skipped,
            assignment=options.assignment,
            make_loader=options.make_loader,
            num_workers=options.num_workers,
            weigh=options.weigh,
            num_weights=options.num_weights,
            sum_over_ranks=lambda table: options.begin_sum(table)(),
            ahead=options.ahead,
            tell=options.tell,
        )
        return WindowReader(iter(windows), windows.filler, windows.places)


TrainingData = MappedData | StreamedData


def saved_places(places: Mapping[int, ReaderState], sharded_by: ShardedBy, device: torch.device) -> dict[str, Any]:
    """Return where the readers of a stream stand, as JSON can hold it: rank to worker to place.

    A state that JSON cannot hold is left out; the stream is then read again on resumption. Collective where the data set
    shards itself; where the runtime does, every rank's place is everybody's.
    """
    kept = {worker: place if fits_json(place.state) else place._replace(state=None) for worker, place in places.items()}
    told = {str(worker): list(place) for worker, place in kept.items()}
    if sharded_by == "runtime":
        return {"0": told}
    replies = gather_bytes(json.dumps(told).encode(), device)
    return {str(rank): json.loads(reply) for rank, reply in enumerate(replies)}


def places_of(told: Mapping[str, Any], rank: int) -> dict[int, ReaderState]:
    """Return a rank's places from what :func:`saved_places` returned."""
    own = told.get(str(rank), told.get("0", {}))
    return {int(worker): ReaderState(*place) for worker, place in own.items()}
