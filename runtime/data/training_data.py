"""Training data, map-style or streamed: its global batches from any cursor on, and its known sizes."""

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
    """This rank's windows while they are read.

    Args:
        windows: with their weights. Collective: every rank must iterate alike.
        filler: a batch for fillers, with several ranks.
        reader_states: by worker, the states of a stream's readers after the last window; empty for map-style data.
    """

    windows: Iterator[Window]
    filler: Any
    reader_states: Mapping[int, ReaderState] = field(default_factory=dict)


@dataclass(frozen=True)
class ReadOptions:
    """Options for reading windows and computing their weights.

    Args:
        num_workers: of the loader.
        weigh: returns the weight of one microbatch, given its batch and number of samples; None: the number of samples.
        num_weights: weights of a microbatch; None: one, as a number.
        begin_sum: starts summing a float64 tensor over all ranks. Collective.
        ahead: steps whose weights are summed at once; equal on all ranks.
        notify: called with a line of information for the user.
    """

    assignment: SlotAssignment
    make_loader: MakeLoader
    num_workers: int
    weigh: Weigh | None
    begin_sum: BeginSum
    num_weights: int | None = None
    ahead: Ahead = 8
    notify: Callable[[str], None] = lambda text: None


class MappedData:
    """A map-style data set with an order."""

    def __init__(self, samples: Samples, order: Order) -> None:
        self.samples, self.order = samples, order

    @property
    def num_samples(self) -> int | None:
        """Samples of the data set; None if unknown."""
        return len(self.samples)

    @property
    def steps_per_epoch(self) -> int | None:
        """Global batches of the first epoch; None if unknown."""
        return self.order.num_batches(0)

    def num_steps(self, epochs: int) -> int | None:
        """Global batches of the first ``epochs`` epochs, which may differ in length; None if unknown."""
        if isinstance(self.order, BudgetOrder):  # otherwise epochs differ only with a user's sampler
            return sum(self.order.num_batches(epoch) for epoch in range(epochs))
        return epochs * self.order.num_batches(0)

    @property
    def smallest_batch(self) -> int:
        """Samples of the first epoch's smallest global batch; 1 for a stream."""
        last = self.order.num_batches(0) - 1
        first = 0 if isinstance(self.order, BudgetOrder) else last
        return min(len(self.order.batch(0, index)) for index in range(first, last + 1))

    def fingerprint(self, assignment: tuple[int, int]) -> dict[str, Any]:
        """Return the data's identity, which must be the same on resumption; ``assignment`` is (ranks, workers)."""
        return fingerprint(self.samples.source)

    def upcoming(self, cursor: Cursor, skipped: Collection[Cursor]) -> Cursor:
        """Return the first global batch from a cursor on that is not skipped."""
        return upcoming(self.order, cursor, skipped)

    def first_batch(self, size: int) -> Any:
        """Return a batch of the run's first ``size`` samples."""
        return next(read(self.samples, iter([SlotIndex(0, self.order.batch(0, 0)[:size])]), read_here))

    def read(
        self,
        options: ReadOptions,
        *,
        start: Cursor,
        stop: Callable[[Cursor, int], bool],
        skipped: Collection[Cursor],
        reader_states: Mapping[int, ReaderState],
    ) -> WindowReader:
        """Start reading from a cursor on."""
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
        """See :class:`MappedData`. If the data set shards itself, its parts depend on the numbers of ranks and workers."""
        source = self.samples.source
        identity = {"samples": None, "id": getattr(source, "fingerprint", None)}
        if self.samples.sharded_by == "dataset":
            identity |= {"ranks": assignment[0], "workers": max(1, assignment[1])}
        return identity

    def upcoming(self, cursor: Cursor, skipped: Collection[Cursor]) -> Cursor:
        """Return the cursor unchanged: the batches of a stream are known only when it is read."""
        return cursor

    def first_batch(self, size: int) -> Any:
        """See :class:`MappedData`; reads with a separate reader, which leaves the stream's position unchanged."""
        slots = -(-self.samples.batch_size // size)
        slot = FIRST if self.samples.sharded_by == "runtime" else 0
        piece = next(read(copy(self.samples), iter([StreamIndex(Cursor(), slot, slots, range(slots))]), read_here))
        if not piece.samples:
            raise DataError(
                "data.train: the stream has too few samples to find the batch size that fits (batch.micro_size: auto)"
            )
        return piece.batch

    def read(
        self,
        options: ReadOptions,
        *,
        start: Cursor,
        stop: Callable[[Cursor, int], bool],
        skipped: Collection[Cursor],
        reader_states: Mapping[int, ReaderState],
    ) -> WindowReader:
        """See :class:`MappedData`."""
        self.samples.reader_states = dict(reader_states)
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
            notify=options.notify,
        )
        return WindowReader(iter(windows), windows.filler, windows.reader_states)


TrainingData = MappedData | StreamedData


def gather_reader_states(
    states: Mapping[int, ReaderState], sharded_by: ShardedBy, device: torch.device
) -> dict[str, Any]:
    """Return the states of all ranks' readers for JSON: rank to worker to state.

    A data set's state that JSON cannot hold becomes None; the stream is then read again on resumption. Collective if the
    data set shards itself; if the runtime does, the states of all ranks are the same.
    """
    kept = {worker: state if fits_json(state.state) else state._replace(state=None) for worker, state in states.items()}
    own = {str(worker): list(state) for worker, state in kept.items()}
    if sharded_by == "runtime":
        return {"0": own}
    replies = gather_bytes(json.dumps(own).encode(), device)
    return {str(rank): json.loads(reply) for rank, reply in enumerate(replies)}


def reader_states_of(saved: Mapping[str, Any], rank: int) -> dict[int, ReaderState]:
    """Return a rank's reader states from the result of :func:`gather_reader_states`."""
    own = saved.get(str(rank), saved.get("0", {}))
    return {int(worker): ReaderState(*state) for worker, state in own.items()}
