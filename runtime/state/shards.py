"""A rank's part of a tensor that several ranks hold together, and reading such a tensor back by slices.

What a strategy hands to a checkpoint is a plain tensor, which rank 0 writes, or a :class:`Shard`, which its own rank writes.
What it gets back is :class:`StoredTensor`: whole, or read from several files as it is asked for, whoever wrote it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from runtime.state.memory_layout import is_dense, laid_out


class Shard(NamedTuple):
    """One rank's part of a whole tensor: a box of it.

    Args:
        shape: of the whole.
        offsets: where the part begins, in each dimension.
        part: the values; None where this rank saves none, since it holds none or another rank saves the same.
    """

    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    part: Tensor | None


class StoredTensor(Protocol):
    """A tensor of a checkpoint, of which any box can be had. A tensor in memory is one too."""

    @property
    def shape(self) -> torch.Size:
        """Of the whole."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of its values."""
        ...

    def __getitem__(self, box: tuple[slice, ...], /) -> Tensor:
        """Return the values within a box, on the CPU."""
        ...


class FileSlice(NamedTuple):
    """Where a box of a whole tensor lies on disk.

    Args:
        file: of safetensors.
        name: in that file.
        offsets: where the box begins in the whole, in each dimension.
        shape: of the box.
    """

    file: Path
    name: str
    offsets: tuple[int, ...]
    shape: tuple[int, ...]


class TensorOnDisk:
    """A tensor in one or several safetensors files, of which no more is read than is asked for."""

    def __init__(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        pieces: Sequence[FileSlice],
        strides: Sequence[int] | None = None,
    ) -> None:
        self.shape = torch.Size(shape)
        self.dtype = dtype
        self.strides = strides
        self._pieces = pieces

    def with_strides(self, strides: Sequence[int]) -> TensorOnDisk:
        """Return the same tensor, which lies in memory in this way once all of it is read.

        Raises:
            ValueError: no dense tensor of its shape does.
        """
        if not is_dense(self.shape, strides):
            raise ValueError(f"{list(strides)} are not the strides of a dense tensor of shape {tuple(self.shape)}")
        return TensorOnDisk(self.shape, self.dtype, self._pieces, strides)

    def __getitem__(self, box: tuple[slice, ...], /) -> Tensor:
        """Return the values within a box, on the CPU; a dimension that is not named is taken whole."""
        bounds = [each.indices(size)[:2] for each, size in zip(box, self.shape, strict=False)]
        bounds += [(0, size) for size in self.shape[len(bounds) :]]
        found = torch.empty([max(0, stop - start) for start, stop in bounds], dtype=self.dtype)
        for piece in self._pieces if found.numel() else ():
            ends = [offset + size for offset, size in zip(piece.offsets, piece.shape, strict=True)]
            shared = [
                (max(start, first), min(stop, end))
                for (start, stop), first, end in zip(bounds, piece.offsets, ends, strict=True)
            ]
            if any(start >= stop for start, stop in shared):
                continue
            there = tuple(slice(a - first, b - first) for (a, b), first in zip(shared, piece.offsets, strict=True))
            here = tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(shared, bounds, strict=True))
            with safe_open(piece.file, framework="pt") as file:
                values = file.get_slice(piece.name)[there] if there else file.get_tensor(piece.name)
            found[here] = values
        return found


def is_stored(value: object) -> bool:
    """Tell whether a value of a checkpoint's state is a tensor."""
    return isinstance(value, Tensor | TensorOnDisk)


def whole(stored: StoredTensor) -> Tensor:
    """Return all of a stored tensor, on the CPU if it is on disk."""
    if isinstance(stored, Tensor):
        return stored
    strides = getattr(stored, "strides", None)
    return stored[()] if strides is None else laid_out(stored[()], strides)


def in_memory(state: Any) -> Any:
    """Return nested state with all that is on disk read."""
    if isinstance(state, TensorOnDisk):
        return whole(state)
    if isinstance(state, Mapping):
        return {key: in_memory(value) for key, value in state.items()}
    if isinstance(state, list | tuple) and not hasattr(state, "_fields"):
        return type(state)(in_memory(value) for value in state)
    return state
