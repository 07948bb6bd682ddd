"""Copy samples, and protect items of streams that reuse one buffer for later items."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from runtime.data.digests import digest

Array = npt.NDArray[Any]

_DEPTH = 8  # of nested objects
_MAX_BYTES = 8192  # compared, of each tensor and its copy


def copied(sample: Any) -> Any:
    """Return a deep copy of a sample, or the sample itself if it cannot be copied.

    For a tensor that is a row of a larger one, only the row is copied; ``deepcopy`` alone would copy the larger one. Parts
    that share memory share it in the copy too.
    """
    clones: dict[Any, Any] = {}
    memo: dict[int, Any] = {}
    try:
        for part in _arrays_of(sample, _DEPTH):
            key = (part.dtype, tuple(part.shape), _address(part) or id(part))
            if key not in clones:
                clones[key] = _cloned(part)
            memo[id(part)] = clones[key]
        return deepcopy(sample, memo)
    except Exception:  # a user's class may raise anything
        return sample


class AliasGuard:
    """Takes items from a stream so that later items do not overwrite earlier ones.

    A stream may reuse one buffer for all items, which is correct for a reader that uses each before asking for the next.
    The first items are copied as they come; if one of them has changed once all are read, every item is copied from then
    on, otherwise none.

    Args:
        watched: number of first items to check: the most that are held at once. Later overwrites are not noticed.
    """

    def __init__(self, watched: int) -> None:
        self._left = self._watched = watched
        self._first: list[tuple[Any, Any]] = []
        self._copies = False

    def for_new_iteration(self) -> AliasGuard:
        """Return the guard for an iteration that begins: this one, unless it was interrupted while checking."""
        return self if not self._left else AliasGuard(self._watched)

    def take(self, iterator: Iterator[Any], size: int) -> list[Any]:
        """Return the next items of a stream, fewer at its end."""
        if self._left:
            return self._watch(iterator, size)
        if self._copies:
            return [copied(item) for item in islice(iterator, size)]
        return list(islice(iterator, size))

    def _watch(self, iterator: Iterator[Any], size: int) -> list[Any]:
        taken = []
        for item in islice(iterator, size):
            taken.append(copied(item))
            self._first.append((item, taken[-1]))
        self._left = max(0, self._left - size)
        if not self._left:
            self._copies = any(_digest(item) != _digest(copy) for item, copy in self._first)
            self._first = []
        return taken


def _digest(item: Any) -> str:
    return digest(item, max_bytes=_MAX_BYTES)


def _cloned(part: Tensor | Array) -> Tensor | Array:
    return part.copy() if isinstance(part, np.ndarray) else part.detach().clone().requires_grad_(part.requires_grad)


def _address(part: Tensor | Array) -> int:
    """Return the address of an array's first element; 0 if it has none or the layout has no address."""
    if isinstance(part, np.ndarray):
        return int(part.ctypes.data) if part.size else 0
    return part.data_ptr() if part.layout == torch.strided and part.numel() else 0


def _arrays_of(value: Any, depth: int) -> Iterator[Tensor | Array]:
    """Yield the tensors and arrays of a sample, nested in mappings, sequences and objects."""
    if isinstance(value, Tensor | np.ndarray):
        yield value
    elif depth:
        parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
        for part in [*parts, *getattr(value, "__dict__", {}).values()]:
            yield from _arrays_of(part, depth - 1)
