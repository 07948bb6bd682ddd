"""Seeded random splits, optionally stratified or by group; equal on every rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset, TensorDataset

from runtime.data.order import Ids, KeyedPermutation
from runtime.errors import DataError
from runtime.randomness import Purpose, derive

REST = "train"


def split_ids(
    num_samples: int,
    held_out: Mapping[str, float | int],
    *,
    seed: int,
    stratify: npt.NDArray[Any] | None = None,
    group: npt.NDArray[Any] | None = None,
) -> dict[str, Ids]:
    """Split sample ids: each id in exactly one part, ids ascending; ``train`` gets all that are not held out.

    Args:
        held_out: fraction (a float below 1, rounded to the nearest number of samples) or size of each part, by name.
        seed: determines the split.
        stratify: class of each sample; each class's share of a part is within one sample of exact, and part sizes are
            exact.
        group: group of each sample; each group is in one part, so part sizes are as close as group sizes allow.

    Raises:
        DataError: no such split exists.
    """
    sizes = {name: _size(share, num_samples) for name, share in held_out.items()}
    sizes[REST] = num_samples - sum(sizes.values())
    for name, size in sizes.items():
        if size < 1:
            raise DataError(f"{num_samples} samples leave none for the {name} part: change the fractions")
    order = KeyedPermutation(num_samples, derive(seed, Purpose.SPLIT))(np.arange(num_samples, dtype=np.int64))
    if group is not None:
        part_of = _by_group(sizes, group, order)
    elif stratify is not None:
        part_of = _by_class(sizes, stratify, order)
    else:
        part_of = np.empty(num_samples, dtype=np.int64)
        part_of[order] = np.repeat(np.arange(len(sizes)), list(sizes.values()))
    return {name: np.flatnonzero(part_of == number).astype(np.int64) for number, name in enumerate(sizes)}


def _size(share: float | int, num_samples: int) -> int:
    return share if isinstance(share, int) else int(share * num_samples + 0.5)


def _by_class(sizes: Mapping[str, int], classes: npt.NDArray[Any], order: Ids) -> Ids:
    labels, numbers = np.unique(classes, return_inverse=True)
    members = np.bincount(numbers)
    if members.min() < 2:
        label = labels[int(np.argmin(members))]
        raise DataError(f"class {label!s:.40} has a single sample, which cannot be in two parts; leave 'stratify' out")
    for name, size in sizes.items():
        if size < len(labels):
            raise DataError(
                f"{size} samples in the {name} part cannot have {len(labels)} classes; leave 'stratify' out"
            )
    counts = _rounded(members.tolist(), list(sizes.values()))
    part_of = np.empty(len(order), dtype=np.int64)
    by_class = order[np.argsort(numbers[order], kind="stable")]  # each class's members in random order
    for ids, shares in zip(np.split(by_class, np.cumsum(members)[:-1]), counts, strict=True):
        part_of[ids] = np.repeat(np.arange(len(sizes)), shares)
    return part_of


def _rounded(members: list[int], sizes: list[int]) -> list[list[int]]:
    """Round ``members[c] * sizes[p] / total`` up or down so that all sums over classes and over parts are kept.

    That is always possible (Cox, "A Constructive Procedure for Unbiased Controlled Rounding", 1987). Each class first gets
    its integer parts; then each of its remaining samples is placed in a part with room, moving other classes' samples if
    necessary.
    """
    total = sum(members)
    cells = [[divmod(count * size, total) for size in sizes] for count in members]
    counts = [[whole for whole, _ in row] for row in cells]
    room = [size - sum(row[part] for row in counts) for part, size in enumerate(sizes)]
    raised: list[set[int]] = [set() for _ in members]  # parts in which a class is rounded up

    def may(one: int, part: int) -> bool:
        return cells[one][part][1] > 0 and part not in raised[one]

    def place(one: int, seen: set[int]) -> bool:
        for part in sorted(range(len(sizes)), key=lambda part: -room[part]):
            if not may(one, part) or part in seen:
                continue
            seen.add(part)
            if room[part]:
                room[part] -= 1
                raised[one].add(part)
                return True
            for other, others in enumerate(raised):
                if part in others and other != one and place(other, seen):
                    others.discard(part)
                    raised[one].add(part)
                    return True
        return False

    for one, count in enumerate(members):
        for _ in range(count - sum(counts[one])):
            placed = place(one, set())
            assert placed, "a controlled rounding always exists"
    return [[whole + (part in raised[one]) for part, whole in enumerate(row)] for one, row in enumerate(counts)]


def _by_group(sizes: Mapping[str, int], groups: npt.NDArray[Any], order: Ids) -> Ids:
    """Assign groups to each held-out part, in random order, while that brings it closer to its size."""
    _, first, numbers, members = np.unique(groups, return_index=True, return_inverse=True, return_counts=True)
    rest = list(sizes).index(REST)
    part_of_group = np.full(len(first), rest, dtype=np.int64)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    in_order = np.argsort(place[first])  # by one member each, so that large groups are not favoured
    for part, (name, size) in enumerate(sizes.items()):
        if part == rest:
            continue
        held = 0
        for one in in_order.tolist():
            if part_of_group[one] == rest and abs(held + members[one] - size) < abs(held - size):
                part_of_group[one] = part
                held += int(members[one])
        if not held:
            raise DataError(f"no group is small enough for the {name} part of {size} samples; change the fractions")
    if not (part_of_group == rest).any():
        raise DataError(f"{len(first)} groups leave none for the {REST} part; change the fractions")
    of_samples: Ids = part_of_group[numbers]
    return of_samples


class Subset(Dataset[Any]):
    """Some samples of a map-style data set, read in the same way as the data set.

    Args:
        source: the data set.
        ids: of the samples, (samples,) int64.
    """

    def __init__(self, source: Any, ids: Ids) -> None:
        self.source = source
        self.ids = ids
        self.deterministic = bool(getattr(source, "deterministic", False))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Any:
        return self.source[int(self.ids[index])]

    def __getitems__(self, indices: list[int]) -> Any:
        """Call the data set's ``__getitems__``, or return a list of samples if it has none."""
        rows = self.ids[indices].tolist()
        if hasattr(self.source, "__getitems__"):
            return self.source.__getitems__(rows)
        return [self.source[row] for row in rows]

    @property
    def fingerprint(self) -> Any:
        """The fingerprint of the whole data set."""
        return getattr(self.source, "fingerprint", None)


class TensorSubset(TensorDataset):
    """Some samples of a TensorDataset, copied into new tensors."""

    def __init__(self, source: TensorDataset, ids: Ids) -> None:
        super().__init__(*(tensor[ids] for tensor in source.tensors))
        self.source = source
        self.ids = ids


def subset(source: Any, ids: Ids) -> Subset | TensorSubset:
    """Return some samples of a data set; of a TensorDataset as a TensorDataset."""
    return TensorSubset(source, ids) if type(source) is TensorDataset else Subset(source, ids)
