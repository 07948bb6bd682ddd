"""Adapter of a map-style data set for the loader: returns whole slots and seeds each sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, TensorDataset, default_collate

from runtime.config.component import described
from runtime.data import worker_info
from runtime.data.copies import copied
from runtime.data.digests import digest
from runtime.data.order import Ids
from runtime.errors import DataError, LockstepError
from runtime.randomness import Purpose, derive, preserved_random_state, seed_everything

_CPU = torch.device("cpu")


class SlotIndex(NamedTuple):
    """A request to a loader worker: the samples of one slot."""

    epoch: int
    ids: Ids


class SampleFailure(NamedTuple):
    """Returned by a worker in place of a batch if the user's data set raised."""

    message: str


class Samples(Dataset[Any]):
    """Adapter of a map-style data set for the loader: indexed by :class:`SlotIndex`, returns one collated batch.

    A deterministic data set (``deterministic = True``, or a TensorDataset) is read a whole slot at a time through
    ``__getitems__``, which may return a list of samples or a finished batch. So is one that takes seeds (``seeded = True``):
    ``__getitems__(ids, seeds)``, with a uint64 derived from (seed, epoch, id) for each sample. Any other is read sample by
    sample, with Python, NumPy and torch seeded with that number before each: random transforms depend on nothing else. A
    user's collate function draws under the seed of the slot's last sample, or of its first if the slot is read whole.
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
        self._custom_collate = collate is not None
        deterministic = isinstance(source, TensorDataset) or bool(getattr(source, "deterministic", False))
        self._seeded = bool(getattr(source, "seeded", False)) and transform is None
        self._whole_slots = deterministic and transform is None

    @property
    def own_batches(self) -> bool:
        """Whether user code makes batches, so that the number of rows may differ from the number of samples."""
        return self._custom_collate or hasattr(self.source, "__getitems__")

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: SlotIndex) -> Any:
        return self.__getitems__(index)

    def __getitems__(self, index: SlotIndex) -> Any:
        """Return one batch, or a failure if reading raised."""
        try:
            with worker_info.hidden():
                if self._seeded:
                    return self._finished(self._fetch_seeded(index), index)
                if self._whole_slots:
                    return self._fetch_whole(index)
                return self._fetch_each(index)
        except LockstepError as error:
            return SampleFailure(str(error))
        except Exception as error:
            return SampleFailure(f"reading samples {_listed(index.ids)} raised {described(error)}")

    def name_of(self, stage: str) -> str:
        """Return the name of the user's data set, transform or collate function."""
        return name_of(stage, self.source, self._transform, self._collate)

    def read_in_stages(self, index: SlotIndex, note: Callable[[Any], str]) -> tuple[str, ...] | SampleFailure:
        """Read one sample and apply ``note`` to it as read, as transformed and as collated.

        Uses the same seeds as training. The transform works on a copy, so that one that modifies its argument does not
        modify the data set.
        """
        number = int(index.ids[0])
        try:
            with worker_info.hidden():
                if self._seeded or self._whole_slots:
                    slot = self._slot_from_source(index)
                    noted = note(slot)
                    return noted, noted, note(self._finished(copied(slot), index))
                seed_everything(derive(self._seed, Purpose.SAMPLE, index.epoch, number), _CPU)
                sample = self.source[number]
                as_read = note(sample)
                sample = copied(sample)
                sample = sample if self._transform is None else self._transform(sample)
                transformed = note(sample)
                return as_read, transformed, note(self._collate([sample]))
        except Exception as error:
            return SampleFailure(f"reading sample {number} raised {described(error)}")

    def memory_fault(self, index: SlotIndex, other: int) -> str:
        """Name the data set or transform that overwrites samples that are read one by one, and say how; empty if none does.

        Args:
            index: of one sample.
            other: number of another one.
        """
        if self._seeded or self._whole_slots:
            return ""
        number = int(index.ids[0])
        with worker_info.hidden():
            first = self.source[number]
            before = digest(first)
            second = self.source[other]
            if digest(first) != before and digest(second) != before:
                return (
                    f"{self.name_of('the data set')} (the data set) reuses one buffer for all samples, so that all samples of "
                    "a batch are the last one: return a copy"
                )
            if self._transform is None:
                return ""
            changed, held = copied((first, self.source[number]))
            seed_everything(derive(self._seed, Purpose.SAMPLE, index.epoch, number), _CPU)
            self._transform(changed)
            if digest(held) != before:
                return (
                    f"{self.name_of('the transform')} (the transform) modifies samples held by the data set, so that each "
                    "epoch modifies them again: return a new sample"
                )
        return ""

    def _slot_from_source(self, index: SlotIndex) -> Any:
        if self._seeded:
            return self._fetch_seeded(index)
        numbers = index.ids.tolist()
        if isinstance(self.source, TensorDataset) or not hasattr(self.source, "__getitems__"):
            return [self.source[number] for number in numbers]
        return self.source.__getitems__(numbers)

    def _fetch_seeded(self, index: SlotIndex) -> Any:
        seeds = [derive(self._seed, Purpose.SAMPLE, index.epoch, i) for i in index.ids.tolist()]
        return self.source.__getitems__(index.ids.tolist(), np.array(seeds, dtype=np.uint64))

    def _fetch_whole(self, index: SlotIndex) -> Any:
        ids = index.ids
        if isinstance(self.source, TensorDataset) and not self._custom_collate:
            rows = torch.from_numpy(ids)
            # Takes half the time of indexing, but needs index and tensor on the same device.
            return tuple([t.index_select(0, rows) if t.is_cpu else t[rows] for t in self.source.tensors])
        return self._finished(self._slot_from_source(index), index)

    def _finished(self, slot: Any, index: SlotIndex) -> Any:
        """Collate a slot that is a list of samples; return a finished batch unchanged."""
        if isinstance(slot, list):
            if not self._custom_collate:
                return self._collate(slot)
            with preserved_random_state(_CPU):
                seed_everything(derive(self._seed, Purpose.SAMPLE, index.epoch, int(index.ids[0])), _CPU)
                return self._collate(slot)
        if self._custom_collate:
            raise DataError(
                f"{type(self.source).__name__}.__getitems__ returns finished batches; leave data.collate out"
            )
        return slot

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


def name_of(stage: str, source: Any, transform: Any, collate: Any) -> str:
    """Return the name of a user's data set, transform or collate function."""
    while hasattr(source, "ids") and hasattr(source, "source"):  # a subset: name the whole data set
        source = source.source
    component = {"the transform": transform, "the collate function": collate}.get(stage, source)
    return str(getattr(component, "__name__", type(component).__name__))


def _listed(ids: Sequence[int] | Ids) -> str:
    first = ", ".join(str(int(i)) for i in ids[:5])
    return f"[{first}, …]" if len(ids) > 5 else f"[{first}]"


def fingerprint(source: Any) -> dict[str, Any]:
    """Return the identity of a data set, compared on resumption: length (None for a stream) and ``fingerprint``, if any."""
    return {
        "samples": None if isinstance(source, IterableDataset) else len(source),
        "id": getattr(source, "fingerprint", None),
    }


def check_samples(source: Any, key: str, *, sharded_by: str | None = None) -> None:
    """Check that a source is a non-empty map-style data set, or a stream with ``sharded_by``.

    Raises:
        DataError: it is not; the message names the configuration key.
    """
    if isinstance(source, IterableDataset):
        if sharded_by is None:
            raise DataError(
                f"{key}: {type(source).__name__} is a stream (IterableDataset). Say what divides it among ranks and workers: "
                f"{key}.sharded_by: runtime (every rank reads all of it and keeps its part; the same result on any number of "
                "ranks), or dataset (it divides itself, using torch.distributed and torch's get_worker_info)"
            )
        return
    if sharded_by is not None:
        raise DataError(
            f"{key}.sharded_by: {type(source).__name__} is no stream (IterableDataset); leave out 'sharded_by' (and 'yields')"
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
