"""This rank's share of each step: slots cut from the global batch, fillers, the loader, and the data cursor.

A step's ids are cut into K slots, evenly and in order; slot k is the same samples on whichever rank runs it. The
loader's index is ``(epoch, ids)``, so that its workers live as long as the run and never hear of epochs.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import tee
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, default_collate

from runtime.component import described
from runtime.errors import DataError, LockstepError
from runtime.order import Ids, Order
from runtime.randomness import Purpose, derive, preserved_random_state, seed_everything

MakeLoader = Callable[..., Iterable[Any]]
"""Makes what yields batches, of a data set and a ``batch_sampler`` of :class:`SlotIndex`."""

Weigh = Callable[[Any, int], float | tuple[float, ...]]
"""Returns the weight of a batch of so many samples, or several weights."""

_CPU = torch.device("cpu")


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
    weight: float | tuple[float, ...] = 0.0


class SlotIndex(NamedTuple):
    """What the loader's workers are asked for."""

    epoch: int
    ids: Ids


class SampleFailure(NamedTuple):
    """What a worker hands back in place of a batch when the user's data set raised."""

    message: str


def default_slots(global_size: int, micro_size: int, world_size: int) -> int:
    """Return K: the smallest multiple of the world size whose slots respect ``micro_size``."""
    needed = -(-global_size // micro_size)
    return -(-needed // world_size) * world_size


def slots_of_rank(slots: int, world_size: int, rank: int) -> range:
    """Return the consecutive slots that a rank runs; ranks differ by at most one."""
    return range(slots * rank // world_size, slots * (rank + 1) // world_size)


def cut(ids: Ids, slots: int, slot: int) -> Ids:
    """Return the ids of one slot; slots differ by at most one sample, and some are empty if there are fewer ids."""
    return ids[len(ids) * slot // slots : len(ids) * (slot + 1) // slots]


class Samples(Dataset[Any]):
    """A map-style data set as the loader sees it: indexed by :class:`SlotIndex`, giving one collated batch.

    A deterministic data set (``deterministic = True``, or a TensorDataset) is read a whole slot at a time through
    ``__getitems__``, which may return a list of samples or a finished batch. So is one that draws by itself from the seeds that
    it is given (``seeded = True``): ``__getitems__(ids, seeds)``, a uint64 for each sample, of (seed, epoch, id). Any other is
    read sample by sample, with python, NumPy and torch seeded so before each: random transforms depend on nothing else.
    """

    def __init__(
        self,
        source: Any,
        *,
        seed: int,
        transform: Callable[[Any], Any] | None = None,
        collate: Callable[[list[Any]], Any] | None = None,
    ) -> None:
        self.source = source
        self._seed = seed
        self._transform = transform
        self._collate = collate or default_collate
        self._own_collate = collate is not None
        deterministic = isinstance(source, TensorDataset) or bool(getattr(source, "deterministic", False))
        self._seeded = bool(getattr(source, "seeded", False)) and transform is None
        self._whole_slots = deterministic and transform is None

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: SlotIndex) -> Any:
        return self.__getitems__(index)

    def __getitems__(self, index: SlotIndex) -> Any:
        """Return one batch, or the failure that kept it from being read."""
        try:
            if self._seeded:
                seeds = [derive(self._seed, Purpose.SAMPLE, index.epoch, i) for i in index.ids.tolist()]
                return self._finished(self.source.__getitems__(index.ids.tolist(), np.array(seeds, dtype=np.uint64)))
            if self._whole_slots:
                return self._fetch_whole(index.ids)
            return self._fetch_each(index)
        except LockstepError as error:
            return SampleFailure(str(error))
        except Exception as error:
            return SampleFailure(f"reading samples {_listed(index.ids)} raised {described(error)}")

    def _fetch_whole(self, ids: Ids) -> Any:
        if isinstance(self.source, TensorDataset) and not self._own_collate:
            rows = torch.from_numpy(ids)
            return tuple(tensor[rows] for tensor in self.source.tensors)
        if not hasattr(self.source, "__getitems__"):
            return self._collate([self.source[int(i)] for i in ids])
        return self._finished(self.source.__getitems__(ids.tolist()))

    def _finished(self, found: Any) -> Any:
        if isinstance(found, list):
            return self._collate(found)
        if self._own_collate:
            raise DataError(f"{type(self.source).__name__}.__getitems__ gives finished batches; leave data.collate out")
        return found

    def _fetch_each(self, index: SlotIndex) -> Any:
        samples = []
        with preserved_random_state(_CPU):
            for i in index.ids.tolist():
                seed_everything(derive(self._seed, Purpose.SAMPLE, index.epoch, i), _CPU)
                try:
                    sample = self.source[i]
                    samples.append(sample if self._transform is None else self._transform(sample))
                except Exception as error:
                    return SampleFailure(f"reading sample {i} of epoch {index.epoch} raised {described(error)}")
            return self._collate(samples)


@dataclass(frozen=True)
class Sharing:
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
        sharing: Sharing,
        make_loader: MakeLoader,
    ) -> None:
        # The loader runs ahead of the training loop; both walk one plan, so that no batch is drawn twice.
        ahead, self._plan = tee(_plan(order, start, stop, frozenset(skipped), sharing))
        self._needs_filler = sharing.world_size > 1
        # No reference back to this object: the loader's workers end when it does, not when garbage is collected.
        indices = _indices(ahead, sharing.slots, filler_first=self._needs_filler)
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


def loader_factory(
    *,
    num_workers: int,
    prefetch_factor: int,
    pin_memory: bool,
    timeout_seconds: int,
    start_method: str | None,
    worker_init: Callable[[int], Any] | None = None,
) -> MakeLoader:
    """Return a maker of loaders with these options; a worker is told nothing, so it has no state of its own.

    Without workers and pinned memory there is nothing for a DataLoader to do, and it would cost 50 µs a batch.
    """
    if num_workers == 0 and not pin_memory:
        return read_here
    return partial(
        DataLoader,
        collate_fn=_as_it_is,
        num_workers=num_workers,
        prefetch_factor=prefetch_factor if num_workers else None,
        pin_memory=pin_memory,
        timeout=timeout_seconds if num_workers else 0,
        multiprocessing_context=start_method if num_workers else None,
        worker_init_fn=partial(_start_worker, worker_init),
        generator=torch.Generator(),  # otherwise the loader draws its base seed from the default generator
    )


def read(samples: Any, indices: Iterator[Any], make_loader: MakeLoader) -> Iterator[Any]:
    """Yield the batches of the given indices, in order.

    Raises:
        DataError: the data set raised, or a worker died.
    """
    batches = iter(make_loader(samples, batch_sampler=indices))
    for worker in getattr(batches, "_workers", ()):
        # It ignores SIGTERM, so torch and Python would wait for it for ever.
        worker._popen.terminate = worker._popen.kill
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except RuntimeError as error:
            if "DataLoader" not in str(error):
                raise
            raise DataError(
                f"a loader worker was lost ({error}); a killed worker is mostly out of memory or shared memory: "
                "lower data.loader.num_workers or prefetch_factor"
            ) from error
        if isinstance(batch, SampleFailure):
            raise DataError(batch.message)
        yield batch


def with_weights(
    windows: Iterator[Window],
    *,
    weigh: Weigh | None,
    num_weights: int | None = None,
    slots: int,
    sum_over_ranks: Callable[[torch.Tensor], torch.Tensor],
    ahead: int = 8,
) -> Iterator[Window]:
    """Fill in each window's global weight before its first forward pass.

    Collective: every rank must iterate, at the same pace, unless ``weigh`` is None.

    Args:
        weigh: weight of one batch of so many samples; None if it is the number of samples, which the order tells.
        num_weights: how many weights a batch has; None: one, as a number.
        sum_over_ranks: sums a float64 tensor over the ranks.
        ahead: steps whose weights travel in one reduction; as many windows are held in memory.
    """
    if weigh is None:
        for window in windows:
            yield window._replace(weight=float(window.samples))
        return
    while block := [window for _, window in zip(range(ahead), windows, strict=False)]:
        # One row a step, one column a slot: summed in slot order, the weight is the same number for any sharing-out.
        weights = torch.zeros(len(block), slots, num_weights or 1, dtype=torch.float64)
        for row, window in enumerate(block):
            for microbatch in window.microbatches:
                if not microbatch.filler:
                    note_weight(weights[row, microbatch.slot], weigh(microbatch.batch, microbatch.samples))
        for window, total in zip(block, sum_over_ranks(weights).sum(dim=1).tolist(), strict=True):
            yield window._replace(weight=told_weight(total, num_weights))


def note_weight(place: torch.Tensor, weight: float | tuple[float, ...]) -> None:
    """Write one weight, or several, to a place in a table."""
    if isinstance(weight, tuple):
        place[:] = torch.tensor(weight, dtype=place.dtype)
    else:
        place.fill_(weight)


def told_weight(total: list[float], num_weights: int | None) -> float | tuple[float, ...]:
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
    order: Order, start: Cursor, stop: Callable[[Cursor, int], bool], skipped: Collection[Cursor], sharing: Sharing
) -> Iterator[tuple[Window, Ids]]:
    cursor, steps = upcoming(order, start, skipped), 0
    run_ends = stop(cursor, 0)
    shares: dict[int, tuple[tuple[Microbatch, ...], int]] = {}  # by samples in the batch, which hardly ever change
    while not run_ends:
        ids = order.batch(cursor.epoch, cursor.batch)
        if len(ids) not in shares:
            shares[len(ids)] = _share(len(ids), sharing)
        microbatches, real_slots = shares[len(ids)]
        next_cursor = upcoming(order, Cursor(cursor.epoch, cursor.batch + 1), skipped)
        steps += 1
        run_ends = stop(next_cursor, steps)
        epoch_ends = next_cursor.epoch > cursor.epoch
        yield Window(cursor, next_cursor, microbatches, len(ids), real_slots, epoch_ends, run_ends), ids
        cursor = next_cursor


def _indices(plan: Iterator[tuple[Window, Ids]], slots: int, *, filler_first: bool) -> Iterator[SlotIndex]:
    for number, (window, ids) in enumerate(plan):
        if number == 0 and filler_first:
            yield SlotIndex(window.cursor.epoch, cut(ids, min(slots, len(ids)), 0))
        for microbatch in window.microbatches:
            if not microbatch.filler:
                yield SlotIndex(window.cursor.epoch, cut(ids, slots, microbatch.slot))


def _share(samples: int, sharing: Sharing) -> tuple[tuple[Microbatch, ...], int]:
    """Return this rank's microbatches of a batch, without data, and how many slots of the batch have samples."""
    slots, world_size = sharing.slots, sharing.world_size
    sizes = [samples * (k + 1) // slots - samples * k // slots for k in range(slots)]
    rounds = max(sum(sizes[k] > 0 for k in slots_of_rank(slots, world_size, rank)) for rank in range(world_size))
    real = [Microbatch(k, sizes[k], None) for k in slots_of_rank(slots, world_size, sharing.rank) if sizes[k]]
    fillers = [Microbatch(-1, 0, None)] * (rounds - len(real))
    return (*real, *fillers), sum(size > 0 for size in sizes)


def read_here(samples: Any, *, batch_sampler: Iterator[Any]) -> Iterator[Any]:
    """Read in this process: a loader without workers."""
    return map(samples.__getitems__, batch_sampler)


def _as_it_is(batch: Any) -> Any:
    return batch


def _start_worker(own: Callable[[int], Any] | None, worker: int) -> None:
    """Leave SIGINT, SIGTERM and SIGUSR1 to the training process; a worker ends with its parent."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if own is not None:
        own(worker)


def _listed(ids: Sequence[int] | Ids) -> str:
    shown = ", ".join(str(int(i)) for i in ids[:5])
    return f"[{shown}, …]" if len(ids) > 5 else f"[{shown}]"


def fingerprint(source: Any) -> dict[str, Any]:
    """Return what identifies a data set on resumption: its length and its own ``fingerprint``, if it has one."""
    return {
        "samples": len(source) if hasattr(source, "__getitem__") else None,
        "id": getattr(source, "fingerprint", None),
    }


def check_samples(source: Any, key: str, *, sharded_by: str | None = None) -> None:
    """Refuse what is neither a map-style data set nor a stream of which is said who shares it out, or an empty one.

    Raises:
        DataError: naming the configuration's key.
    """
    if isinstance(source, IterableDataset):
        if sharded_by is None:
            raise DataError(
                f"{key}: {type(source).__name__} is a stream (IterableDataset). Say who shares it out over ranks and workers: "
                f"{key}.sharded_by: runtime (every rank reads all of it and keeps its part; the same answer on any number of "
                "ranks), or dataset (it does so itself, by torch.distributed and torch's get_worker_info)"
            )
        return
    if sharded_by is not None:
        raise DataError(
            f"{key}.sharded_by: {type(source).__name__} is no stream (IterableDataset); leave 'sharded_by' out"
        )
    if not hasattr(source, "__getitem__") or not hasattr(source, "__len__"):
        raise DataError(
            f"{key}: {type(source).__name__} has no __getitem__ and __len__; a map-style data set is needed"
        )
    try:
        size = len(source)
    except Exception as error:
        raise DataError(f"{key}: the length of {type(source).__name__} raised {described(error)}") from error
    if size == 0:
        raise DataError(f"{key}: the data set is empty")
