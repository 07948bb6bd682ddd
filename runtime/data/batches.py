"""This rank's share of each step: slots cut from the global batch, fillers, the loader, and the data cursor.

A step's ids are cut into K slots, evenly and in order; slot k is the same samples on whichever rank runs it. The
loader's index is ``(epoch, ids)``, so that its workers live as long as the run and never hear of epochs.
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
"""Returns the weight of a batch of so many samples, or several weights."""

BeginSum = Callable[[torch.Tensor], Callable[[], torch.Tensor]]
"""Begins to sum a CPU tensor over all ranks; what it returns waits for the sum. Collective."""


class Cursor(NamedTuple):
    """The next global batch to be consumed."""

    epoch: int = 0
    batch: int = 0


class Microbatch(NamedTuple):
    """What one forward pass takes.

    Args:
        slot: its number in the step.
        samples: how many samples it has; 0 for a filler.
        batch: what the collate function made of them.
    """

    slot: int
    samples: int
    batch: Any

    @property
    def filler(self) -> bool:
        """Tell whether it counts for nothing."""
        return self.samples == 0


class Window(NamedTuple):
    """One step's microbatches on this rank.

    Args:
        cursor: which global batch it is part of.
        next_cursor: the global batch after it.
        microbatches: as many on every rank.
        samples: in the whole global batch, over all ranks.
        real_slots: slots with samples, over all ranks.
        epoch_ends: whether it is the last global batch of its epoch.
        run_ends: whether the run's limit is reached after it.
        weight: what the step's loss sum, or each of several, is divided by, over all ranks; 0.0 if nothing counts.
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
    """Return K: the smallest multiple of the world size whose slots respect ``micro_size``."""
    needed = -(-global_size // micro_size)
    return -(-needed // world_size) * world_size


def slots_of_rank(slots: int, world_size: int, rank: int) -> range:
    """Return the consecutive slots that a rank runs; ranks differ by at most one."""
    return range(slots * rank // world_size, slots * (rank + 1) // world_size)


def slot_slice(ids: Ids, slots: int, slot: int) -> Ids:
    """Return the ids of one slot; slots differ by at most one sample, and some are empty if there are fewer ids."""
    return ids[len(ids) * slot // slots : len(ids) * (slot + 1) // slots]


@dataclass(frozen=True)
class SlotAssignment:
    """How the steps of a run are cut up and shared out.

    Args:
        slots: K, microbatches of a step over all ranks.
        world_size: number of processes.
        rank: this process.
    """

    slots: int
    world_size: int
    rank: int


class Windows:
    """This rank's windows from a cursor on, read ahead as the loader does; iterate once.

    Args:
        stop: told the cursor and the number of steps yielded so far, whether the run's limit is reached.
        skipped: global batches that are left out.
        make_loader: see :func:`loader_factory`.

    Attributes:
        filler: with several ranks the batch of the first step's first slot, which fillers reuse: a rank may have to run
            one before it has seen a batch of its own. It is read by the loader, so that nothing of the data set is
            opened in this process before workers are forked from it.

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
        # The loader runs ahead of the training loop; both walk one plan, so that no batch is drawn twice.
        ahead, self._plan = tee(_plan(order, start, stop, frozenset(skipped), assignment))
        self._needs_filler = assignment.world_size > 1
        # No reference back to this object: the loader's workers end when it does, not when garbage is collected.
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
    """Replace each window's global weight, the number of samples, before its first forward pass.

    The weights of a block of steps travel in one reduction, see :func:`runtime.data.reading_ahead.summed_ahead`. Collective:
    every rank must iterate, at the same pace.

    Args:
        weigh: weight of one batch of so many samples.
        num_weights: how many weights a batch has; None: one, as a number.
        begin_sum: begins to sum a float64 tensor over the ranks; None: there is one.
        ahead: steps of a block.
    """
    if begin_sum is None:
        return _weighed_alone(windows, weigh=weigh, num_weights=num_weights, slots=slots)

    def begin(block: list[Window]) -> Callable[[], list[Window]]:
        # One row a step, one column a slot: summed in slot order, the weight is the same number for any sharing-out.
        weights = torch.zeros(len(block), slots, num_weights or 1, dtype=torch.float64)
        for row, window in enumerate(block):
            for microbatch in window.microbatches:
                if not microbatch.filler:
                    note_weight(weights[row, microbatch.slot], weigh(microbatch.batch, microbatch.samples))
        finish_sum = begin_sum(weights)
        return lambda: [
            window._replace(weight=weight_of_batch(total, num_weights))
            for window, total in zip(block, finish_sum().sum(dim=1).tolist(), strict=True)
        ]

    return summed_ahead(windows, begin, ahead)


def _weighed_alone(windows: Iterator[Window], *, weigh: Weigh, num_weights: int | None, slots: int) -> Iterator[Window]:
    """Weigh each window when it is needed: nobody waits for anybody. The weights are those of several ranks, bit for bit."""
    for window in windows:
        weights = [weigh(microbatch.batch, microbatch.samples) for microbatch in window.microbatches]
        whole = [weight for weight in weights if isinstance(weight, float) and weight.is_integer()]
        if num_weights is None and len(whole) == len(weights):
            yield window._replace(weight=sum(whole, 0.0))  # exact in any order
            continue
        table = torch.zeros(1, slots, num_weights or 1, dtype=torch.float64)
        for microbatch, weight in zip(window.microbatches, weights, strict=True):
            note_weight(table[0, microbatch.slot], weight)
        (total,) = table.sum(dim=1).tolist()
        yield window._replace(weight=weight_of_batch(total, num_weights))


def note_weight(place: torch.Tensor, weight: float | tuple[float, ...]) -> None:
    """Write one weight, or several, to a place in a table."""
    if isinstance(weight, tuple):
        place[:] = torch.tensor(weight, dtype=place.dtype)
    else:
        place.fill_(weight)


def weight_of_batch(total: list[float], num_weights: int | None) -> float | tuple[float, ...]:
    """Return a global batch's weight as a number, or as several unless nothing counts at all."""
    return tuple(total) if num_weights is not None and any(total) else sum(total)


def upcoming(order: Order, cursor: Cursor, skipped: Collection[Cursor]) -> Cursor:
    """Return the first global batch from a cursor on that is not left out."""
    while True:
        # The first batch of an epoch is there; asking would draw the epoch's order before it is needed.
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
    shares: dict[int, tuple[tuple[Microbatch, ...], int]] = {}  # by samples in the batch, which hardly ever change
    while not run_ends:
        ids = order.batch(cursor.epoch, cursor.batch)
        if len(ids) not in shares:
            shares[len(ids)] = _share(len(ids), assignment)
        microbatches, real_slots = shares[len(ids)]
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


def _share(samples: int, assignment: SlotAssignment) -> tuple[tuple[Microbatch, ...], int]:
    """Return this rank's microbatches of a batch, without data, and how many slots of the batch have samples."""
    slots, world_size = assignment.slots, assignment.world_size
    sizes = [samples * (k + 1) // slots - samples * k // slots for k in range(slots)]
    rounds = max(sum(sizes[k] > 0 for k in slots_of_rank(slots, world_size, rank)) for rank in range(world_size))
    real = [Microbatch(k, sizes[k], None) for k in slots_of_rank(slots, world_size, assignment.rank) if sizes[k]]
    fillers = [Microbatch(-1, 0, None)] * (rounds - len(real))
    return (*real, *fillers), sum(size > 0 for size in sizes)
