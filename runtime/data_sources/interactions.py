"""Implicit feedback for ranking: (user, positive, negative) triples for training, all unseen items for evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from runtime.data_sources.columns import TextColumn, read_csv
from runtime.errors import DataError
from runtime.files import digest, existing, rows_within
from runtime.randomness import mix
from runtime.wording import did_you_mean

_PARTS = ("train", "validation", "test")
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class _Read:
    """A file of choices, split into parts.

    Args:
        users: (choices,) int64, numbered in the order of their sorted names.
        items: (choices,) int64, likewise.
        part: (choices,) int64, position in ``_PARTS``.
    """

    users: NDArray[np.int64]
    items: NDArray[np.int64]
    part: NDArray[np.int64]
    num_users: int
    num_items: int
    fingerprint: str

    def pairs(self, *parts: int) -> NDArray[np.int64]:
        """Return the sorted (user, item) pairs of some parts, each encoded as ``user * num_items + item``."""
        chosen = np.isin(self.part, parts)
        return np.unique(self.users[chosen] * self.num_items + self.items[chosen])


class Choices(Dataset[dict[str, Tensor]]):
    """Items that users chose, each with a random negative: ``{user, positive, negative}`` for ``BPRLoss``.

    A random fraction of each user's choices is held out for validation and for test (:class:`Candidates`). A negative item
    is drawn uniformly from the items that are not among the user's training choices, under the sample's seed of each epoch.

    Args:
        path: a table with one choice per row, whose first line names the columns; such as RecBole's ``.inter`` files.
        user: column of users. They are numbered from 0 in the sorted order of their names (numerically if all are numbers).
        item: column of items, likewise.
        validation: fraction of each user's choices, rounded down, but at least one if another is left for training.
        test: the same.
        seed: determines the split; must be the same for all parts.
        delimiter: between two values. Default: a tab.
        provided_by: command that installs the file, for the error message if it is missing.

    Raises:
        DataError: the file or a column is missing, the fractions leave nothing to train on, or a user chose every item.
    """

    seeded = True

    def __init__(
        self,
        path: str,
        *,
        user: str = "user_id:token",
        item: str = "item_id:token",
        validation: float = 0.1,
        test: float = 0.1,
        seed: int = 0,
        delimiter: str = "\t",
        provided_by: str | None = None,
    ) -> None:
        read = _read(
            path,
            user=user,
            item=item,
            validation=validation,
            test=test,
            seed=seed,
            delimiter=delimiter,
            provided_by=provided_by,
        )
        chosen = read.part == 0
        self._users, self._items, self.num_items = read.users[chosen], read.items[chosen], read.num_items
        self._taken = read.pairs(0)
        if int(np.bincount(self._taken // self.num_items).max()) == self.num_items:
            raise DataError(f"{path}: a user chose every item, so there is no negative item to draw")
        self.fingerprint = f"choices {read.fingerprint}"

    def __len__(self) -> int:
        return len(self._users)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return one sample, its negative item drawn from torch's generator."""
        seed = torch.randint(2**62, (1,)).numpy().astype(np.uint64)
        return {name: part[0] for name, part in self.__getitems__([index], seed).items()}

    def __getitems__(self, indices: list[int], seeds: NDArray[np.uint64]) -> dict[str, Tensor]:
        """Return a finished batch: three parts, each (n,) int64.

        Args:
            seeds: (n,) uint64, one per sample.
        """
        rows = rows_within(indices, len(self))
        users = self._users[rows]
        negatives = np.empty(len(rows), dtype=np.int64)
        pending = np.arange(len(rows))
        attempt = 0
        while pending.size:  # rejection sampling: on MovieLens one draw in sixteen is a choice of the user
            drawn = _mixed(seeds[pending] + np.array([attempt], dtype=np.uint64) * _GOLDEN) % np.uint64(self.num_items)
            negatives[pending] = drawn.astype(np.int64)
            pending = pending[_among(self._taken, users[pending] * self.num_items + negatives[pending])]
            attempt += 1
        parts = {"user": users, "positive": self._items[rows], "negative": negatives}
        return {name: torch.from_numpy(part) for name, part in parts.items()}


class Candidates(Dataset[dict[str, Tensor]]):
    """Every item that a user has not chosen before, for full ranking: ``{user, item, target}``.

    The target is 1 for items of the held-out part, else 0. Each user's training choices are left out, for ``test`` also the
    validation choices; so are users without held-out items. ``data.fields.group: user`` ranks by user.

    Args:
        path: see :class:`Choices`, as for all other arguments, which must equal those of the training part.
        split: ``validation`` or ``test``.

    Raises:
        DataError: as in :class:`Choices`, or no user has a choice in this part.
    """

    deterministic = True

    def __init__(
        self,
        path: str,
        split: str,
        *,
        user: str = "user_id:token",
        item: str = "item_id:token",
        validation: float = 0.1,
        test: float = 0.1,
        seed: int = 0,
        delimiter: str = "\t",
        provided_by: str | None = None,
    ) -> None:
        if split not in _PARTS[1:]:
            raise DataError(f"split {split!r} is unknown{did_you_mean(split, _PARTS[1:])}; use 'validation' or 'test'")
        read = _read(
            path,
            user=user,
            item=item,
            validation=validation,
            test=test,
            seed=seed,
            delimiter=delimiter,
            provided_by=provided_by,
        )
        number = _PARTS.index(split)
        relevant = read.pairs(number)
        if not relevant.size:
            raise DataError(f"{path}: no user has enough choices to hold one out for {split}")
        users = np.unique(relevant // read.num_items)
        every = (users[:, np.newaxis] * read.num_items + np.arange(read.num_items)).reshape(-1)
        pairs = every[~_among(read.pairs(*range(number)), every)]
        self._users, self._items = pairs // read.num_items, pairs % read.num_items
        self._relevant = _among(relevant, pairs).astype(np.int64)
        self.fingerprint = f"candidates {split} {read.fingerprint}"

    def __len__(self) -> int:
        return len(self._users)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return one (user, item) pair."""
        return {name: part[0] for name, part in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """Return a finished batch: three parts, each (n,) int64."""
        rows = rows_within(indices, len(self))
        parts = {"user": self._users[rows], "item": self._items[rows], "target": self._relevant[rows]}
        return {name: torch.from_numpy(part) for name, part in parts.items()}


def _read(
    path: str,
    *,
    user: str,
    item: str,
    validation: float,
    test: float,
    seed: int,
    delimiter: str,
    provided_by: str | None,
) -> _Read:
    for name, share in (("validation", validation), ("test", test)):
        if not 0 <= share < 1:
            raise DataError(f"{name}={share}: the fraction must be at least 0 and below 1")
    if validation + test >= 1:
        raise DataError(f"validation={validation} and test={test} leave nothing to train on")
    file = existing(path, provided_by=provided_by)
    columns = read_csv(file, numbers=[], texts=[user, item], missing=("",), delimiter=delimiter, encoding="utf-8")
    (users, num_users), (items, num_items) = (_numbered(file, name, columns[name]) for name in (user, item))
    part = _split(users, (validation, test), seed)
    fingerprint = f"{digest(Path(file))} {user} {item} {validation} {test} {seed}"
    return _Read(users, items, part, num_users, num_items, fingerprint)


def _numbered(path: Path, name: str, column: Any) -> tuple[NDArray[np.int64], int]:
    assert isinstance(column, TextColumn)
    if (column.codes < 0).any():
        raise DataError(f"{path}: column {name!r} has no value in row {int(np.argmax(column.codes < 0))} (from 0)")
    numeric = all(known.isdecimal() for known in column.known)
    order = sorted(range(len(column.known)), key=lambda n: (int(column.known[n]) if numeric else 0, column.known[n]))
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    return place[column.codes], len(order)


def _split(users: NDArray[np.int64], shares: tuple[float, float], seed: int) -> NDArray[np.int64]:
    """Return each choice's part. Sizes are those of RecBole's ratio split by user: rounded down, but at least one."""
    counter = np.arange(len(users), dtype=np.uint64)
    keys = _mixed(_mixed(np.array([seed], dtype=np.int64).view(np.uint64)) + counter * _GOLDEN)
    order = np.lexsort((keys, users))  # by user, random within each user
    num_choices = np.bincount(users)
    rest = num_choices.copy()
    sizes = []
    for share in reversed(shares):  # the test part first, in case there are too few for both
        size = np.floor(share * num_choices + 1e-9).astype(np.int64)
        size[(size == 0) & (rest > 1) & (share > 0)] = 1
        rest -= size
        sizes.append(size)
    of_test, of_validation = sizes
    place = np.arange(len(users)) - np.repeat(np.cumsum(num_choices) - num_choices, num_choices)
    owner = users[order]
    part = np.empty(len(users), dtype=np.int64)
    part[order] = np.where(place < of_test[owner], 2, np.where(place < (of_test + of_validation)[owner], 1, 0))
    return part


def _among(known: NDArray[np.int64], values: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return a mask of the values that are in ``known``, which must be sorted."""
    if not known.size:
        return np.zeros(values.shape, dtype=np.bool_)
    place = np.minimum(np.searchsorted(known, values), len(known) - 1)
    mask: NDArray[np.bool_] = known[place] == values
    return mask


def _mixed(counter: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the output of splitmix64 for each counter."""
    return mix(counter + _GOLDEN)
