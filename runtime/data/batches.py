"""This rank's part of each step: slots of the global batch, fillers, the loader, and the data cursor.

A step's ids are split into K slots, evenly and in order; slot k holds the same samples on whichever rank runs it. The
loader's index is ``(epoch, ids)``, so its workers live as long as the run and need not know about epochs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from itertools import tee
from typing import Any, NamedTuple

import torch

from runtime.data.loading import MakeLoader, read
from runtime.data.order import Ids, Order
from runtime.data.reading_ahead import Ahead, summed_ahead
from runtime.data.samples import Samples, SlotIndex

Weigh = Callable[[Any, int], float | tuple[float, ...]]
"""Returns the weight, or weights, of a batch, given the batch and its number of samples."""

BeginSum = Callable[[torch.Tensor], Callable[[], torch.Tensor]]
"""Starts summing a CPU tensor over all ranks; the returned function waits for the sum. Collective."""


class Cursor(NamedTuple):
    """The next global batch to be consumed."""

    epoch: int = 0
    batch: int = 0


class Microbatch(NamedTuple):
    """The input of one forward pass.

    Args:
        slot: number in the step.
        samples: number of samples; 0 for a filler.
        batch: the collated samples.
    """

    slot: int
    samples: int
    batch: Any

    @property
    def filler(self) -> bool:
        """Whether it contributes nothing to loss and gradient."""
        return self.samples == 0


class Window(NamedTuple):
    """One step's microbatches on this rank.

    Args:
        cursor: the global batch that it is part of.
        next_cursor: the global batch after it.
        microbatches: the same number on every rank.
        samples: in the whole global batch, over all ranks.
        real_slots: slots with samples, over all ranks.
        epoch_ends: whether it is the last global batch of its epoch.
        run_ends: whether the run's limit is reached after it.
        weight: divisor of the step's loss sum, or of each of several, over all ranks; 0.0 if nothing counts.
    """

    cursor: Cursor
    next_cursor: Cursor
    microbatches: tuple[Microbatch, ...]
    samples: int
    real_slots: int
    epoch_ends: bool
    run_ends: bool
    weight: float | tuple[float, ...]


def default_slots(global_size: int, micro_size: int, world_size: int) -> int:
    """Return K: the smallest multiple of the world size whose slots have at most ``micro_size`` samples."""
    needed = -(-global_size // micro_size)
    return -(-needed // world_size) * world_size


def slots_of_rank(slots: int, world_size: int, rank: int) -> range:
    """Return the consecutive slots that a rank runs; the ranks' numbers of slots differ by at most one."""
    return range(slots * rank // world_size, slots * (rank + 1) // world_size)


def slots_of_ranks(slots: int, world_size: int) -> list[range]:
    """Return the slots of each rank."""
    return [slots_of_rank(slots, world_size, rank) for rank in range(world_size)]


def slot_slice(ids: Ids, slots: int, slot: int) -> Ids:
    """Return the ids of one slot; slot sizes differ by at most one, and some slots are empty if there are fewer ids."""
    return ids[len(ids) * slot // slots : len(ids) * (slot + 1) // slots]


@dataclass(frozen=True)
class SlotAssignment:
    """How steps are split into slots and slots are assigned to ranks.

    Args:
        slots: K, microbatches of a step over all ranks.
        world_size: number of processes.
        rank: this process.
    """

    slots: int
    world_size: int
    rank: int


class Windows:
    """This rank's windows from a cursor on, prefetched by the loader; iterate once.

    Args:
        stop: given the cursor and the number of steps yielded so far, returns whether the run's limit is reached.
        skipped: global batches to leave out.
        make_loader: see :func:`loader_factory`.

    Attributes:
        filler: with several ranks the batch of the first step's first slot, which fillers reuse: a rank may have to run
            a filler before it has read any batch. It is read by the loader, so that the data set opens nothing in this
            process before workers are forked from it.

    Raises:
        DataError: the data set raised, or a worker died.
    """

    def __init__(
        self,
        samples: Samples,
        order: Order,
        *,
        start: Cursor,
        stop: Callable[[Cursor, int], bool],
        skipped: Collection[Cursor] = (),
        assignment: SlotAssignment,
        make_loader: MakeLoader,
    ) -> None:
        # The loader runs ahead of the training loop; both iterate over one plan, so that no batch is drawn twice.
        ahead, self._plan = tee(_plan(order, start, stop, frozenset(skipped), assignment))
        self._needs_filler = assignment.world_size > 1
        # No reference back to this object: the loader's workers end with it, not at the next garbage collection.
        indices = _indices(ahead, assignment.slots, filler_first=self._needs_filler)
        self._fetched = read(samples, indices, make_loader)
        self.filler = next(self._fetched) if self._needs_filler else None

    def __iter__(self) -> Iterator[Window]:
        for window, _ in self._plan:
            microbatches = tuple(
                [
                    Microbatch(slot, samples, next(self._fetched) if samples else self.filler)
                    for slot, samples, _ in window.microbatches
                ]
            )
            yield window._replace(microbatches=microbatches)


def with_weights(
    windows: Iterator[Window],
    *,
    weigh: Weigh,
    num_weights: int | None = None,
    slots: int,
    begin_sum: BeginSum | None,
    ahead: Ahead = 8,
) -> Iterator[Window]:
    """Set each window's global weight, so far the number of samples, before its first forward pass.

    The weights of a block of steps are summed in one reduction, see :func:`runtime.data.reading_ahead.summed_ahead`.
    Collective: every rank must iterate, at the same pace.

    Args:
        weigh: returns the weight of one batch, given the batch and its number of samples.
        num_weights: weights of a batch; None: one, as a number.
        begin_sum: starts summing a float64 tensor over the ranks; None: there is one rank.
        ahead: steps of a block.
    """
    if begin_sum is None:
        return _weighed_on_one_rank(windows, weigh=weigh, num_weights=num_weights, slots=slots)

    def begin(block: list[Window]) -> Callable[[], list[Window]]:
        # One row per step, one column per slot: summed in slot order, the weight is the same for any number of ranks.
        weights = torch.zeros(len(block), slots, num_weights or 1, dtype=torch.float64)
        for row, window in enumerate(block):
            for microbatch in window.microbatches:
                if not microbatch.filler:
                    write_weight(weights[row, microbatch.slot], weigh(microbatch.batch, microbatch.samples))
        finish_sum = begin_sum(weights)
        return lambda: [
            window._replace(weight=weight_of_batch(total, num_weights))
            for window, total in zip(block, finish_sum().sum(dim=1).tolist(), strict=True)
        ]

    return summed_ahead(windows, begin, ahead)


def _weighed_on_one_rank(
    windows: Iterator[Window], *, weigh: Weigh, num_weights: int | None, slots: int
) -> Iterator[Window]:
    """Compute each window's weight when it is needed; bitwise equal to the weights with several ranks."""
    for window in windows:
        weights = [weigh(microbatch.batch, microbatch.samples) for microbatch in window.microbatches]
        whole = [weight for weight in weights if isinstance(weight, float) and weight.is_integer()]
        if num_weights is None and len(whole) == len(weights):
            yield window._replace(weight=sum(whole, 0.0))  # exact in any order
            continue
        table = torch.zeros(1, slots, num_weights or 1, dtype=torch.float64)
        for microbatch, weight in zip(window.microbatches, weights, strict=True):
            write_weight(table[0, microbatch.slot], weight)
        (total,) = table.sum(dim=1).tolist()
        yield window._replace(weight=weight_of_batch(total, num_weights))


def write_weight(cell: torch.Tensor, weight: float | tuple[float, ...]) -> None:
    """Write one weight, or several, to a cell (weights,) of a table."""
    if isinstance(weight, tuple):
        cell[:] = torch.tensor(weight, dtype=cell.dtype)
    else:
        cell.fill_(weight)


def weight_of_batch(total: list[float], num_weights: int | None) -> float | tuple[float, ...]:
    """Return a global batch's weight as a number, or as a tuple if there are several and one is not zero."""
    return tuple(total) if num_weights is not None and any(total) else sum(total)


def upcoming(order: Order, cursor: Cursor, skipped: Collection[Cursor]) -> Cursor:
    """Return the first global batch from a cursor on that is not skipped."""
    while True:
        # Every epoch has a first batch; calling num_batches would draw the epoch's order before it is needed.
        if cursor.batch and cursor.batch >= order.num_batches(cursor.epoch):
            cursor = Cursor(cursor.epoch + 1, 0)
        elif cursor in skipped:
            cursor = Cursor(cursor.epoch, cursor.batch + 1)
        else:
            return cursor


def _plan(
    order: Order,
    start: Cursor,
    stop: Callable[[Cursor, int], bool],
    skipped: Collection[Cursor],
    assignment: SlotAssignment,
) -> Iterator[tuple[Window, Ids]]:
    cursor, steps = upcoming(order, start, skipped), 0
    run_ends = stop(cursor, 0)
    # Cached by the number of samples in the batch, which rarely changes.
    assigned: dict[int, tuple[tuple[Microbatch, ...], int]] = {}
    while not run_ends:
        ids = order.batch(cursor.epoch, cursor.batch)
        if len(ids) not in assigned:
            assigned[len(ids)] = _microbatches(len(ids), assignment)
        microbatches, real_slots = assigned[len(ids)]
        next_cursor = upcoming(order, Cursor(cursor.epoch, cursor.batch + 1), skipped)
        steps += 1
        run_ends = stop(next_cursor, steps)
        epoch_ends = next_cursor.epoch > cursor.epoch
        samples = len(ids)
        weight = float(samples)
        yield Window(cursor, next_cursor, microbatches, samples, real_slots, epoch_ends, run_ends, weight), ids
        cursor = next_cursor


def _indices(plan: Iterator[tuple[Window, Ids]], slots: int, *, filler_first: bool) -> Iterator[SlotIndex]:
    for number, (window, ids) in enumerate(plan):
        if number == 0 and filler_first:
            yield SlotIndex(window.cursor.epoch, slot_slice(ids, min(slots, len(ids)), 0))
        for microbatch in window.microbatches:
            if not microbatch.filler:
                yield SlotIndex(window.cursor.epoch, slot_slice(ids, slots, microbatch.slot))


def _microbatches(samples: int, assignment: SlotAssignment) -> tuple[tuple[Microbatch, ...], int]:
    """Return this rank's microbatches of a batch, without data, and the number of the batch's slots with samples."""
    slots, world_size = assignment.slots, assignment.world_size
    sizes = [samples * (k + 1) // slots - samples * k // slots for k in range(slots)]
    rounds = max(sum(sizes[k] > 0 for k in slots_of_rank(slots, world_size, rank)) for rank in range(world_size))
    real = [Microbatch(k, sizes[k], None) for k in slots_of_rank(slots, world_size, assignment.rank) if sizes[k]]
    fillers = [Microbatch(-1, 0, None)] * (rounds - len(real))
    return (*real, *fillers), sum(size > 0 for size in sizes)
