"""A map-style data set as the loader sees it: whole slots, each sample under a seed of its own."""

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
    """What the loader's workers are asked for."""

    epoch: int
    ids: Ids


class SampleFailure(NamedTuple):
    """What a worker hands back in place of a batch when the user's data set raised."""

    message: str


class Samples(Dataset[Any]):
    """A map-style data set as the loader sees it: indexed by :class:`SlotIndex`, giving one collated batch.

    A deterministic data set (``deterministic = True``, or a TensorDataset) is read a whole slot at a time through
    ``__getitems__``, which may return a list of samples or a finished batch. So is one that draws by itself from the seeds that
    it is given (``seeded = True``): ``__getitems__(ids, seeds)``, a uint64 for each sample, of (seed, epoch, id). Any other is
    read sample by sample, with python, NumPy and torch seeded so before each: random transforms depend on nothing else. A
    collate function of the user's own draws under the seed of the slot's last sample, or of its first where it is read whole.
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

    @property
    def own_batches(self) -> bool:
        """Tell whether code of the user's makes batches, which may have other rows than samples were asked for."""
        return self._own_collate or hasattr(self.source, "__getitems__")

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: SlotIndex) -> Any:
        return self.__getitems__(index)

    def __getitems__(self, index: SlotIndex) -> Any:
        """Return one batch, or the failure that kept it from being read."""
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
        """Return what the user calls the data set, the transform or the collate function."""
        return name_of(stage, self.source, self._transform, self._collate)

    def read_in_stages(self, index: SlotIndex, note: Callable[[Any], str]) -> tuple[str, ...] | SampleFailure:
        """Read one sample and note what the data set gives, what the transform makes of it, and what is collated.

        Draws as reading it for training does. The transform works on a copy, so that one that changes its argument changes
        nothing that the data set holds.
        """
        number = int(index.ids[0])
        try:
            with worker_info.hidden():
                if self._seeded or self._whole_slots:
                    found = self._given_whole(index)
                    given = made = note(found)
                    return given, made, note(self._finished(copied(found), index))
                seed_everything(derive(self._seed, Purpose.SAMPLE, index.epoch, number), _CPU)
                sample = self.source[number]
                given = note(sample)
                sample = copied(sample)
                sample = sample if self._transform is None else self._transform(sample)
                made = note(sample)
                return given, made, note(self._collate([sample]))
        except Exception as error:
            return SampleFailure(f"reading sample {number} raised {described(error)}")

    def memory_at_fault(self, index: SlotIndex, other: int) -> str:
        """Say how samples overwrite each other where they are read one by one; nothing where they do not.

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
                    "fills one buffer with each sample, so that all samples of a batch are the last one: return a copy"
                )
            if self._transform is None:
                return ""
            changed, held = copied((first, self.source[number]))
            seed_everything(derive(self._seed, Purpose.SAMPLE, index.epoch, number), _CPU)
            self._transform(changed)
            if digest(held) != before:
                return (
                    "changes what the data set holds, so that each epoch changes it again: let it return a new sample"
                )
        return ""

    def _given_whole(self, index: SlotIndex) -> Any:
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
        if isinstance(self.source, TensorDataset) and not self._own_collate:
            rows = torch.from_numpy(ids)
            # Half of what indexing takes, which, though, finds rows on another device than theirs.
            return tuple([t.index_select(0, rows) if t.is_cpu else t[rows] for t in self.source.tensors])
        return self._finished(self._given_whole(index), index)

    def _finished(self, found: Any, index: SlotIndex) -> Any:
        if isinstance(found, list):
            if not self._own_collate:
                return self._collate(found)
            with preserved_random_state(_CPU):
                seed_everything(derive(self._seed, Purpose.SAMPLE, index.epoch, int(index.ids[0])), _CPU)
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


def name_of(stage: str, source: Any, transform: Any, collate: Any) -> str:
    """Return what the user calls a data set, a transform or a collate function."""
    while hasattr(source, "ids") and hasattr(source, "source"):  # what it is a part of
        source = source.source
    named = {"the transform": transform, "the collate function": collate}.get(stage, source)
    return str(getattr(named, "__name__", type(named).__name__))


def _listed(ids: Sequence[int] | Ids) -> str:
    shown = ", ".join(str(int(i)) for i in ids[:5])
    return f"[{shown}, …]" if len(ids) > 5 else f"[{shown}]"


def fingerprint(source: Any) -> dict[str, Any]:
    """Return what identifies a data set on resumption: its length (a stream has none) and its own ``fingerprint``, if any."""
    return {
        "samples": None if isinstance(source, IterableDataset) else len(source),
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
            f"{key}.sharded_by: {type(source).__name__} is no stream (IterableDataset); leave 'sharded_by' (and 'yields') out"
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
