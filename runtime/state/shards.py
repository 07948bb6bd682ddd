"""Shards of tensors that several ranks hold together, and reading such tensors back by slices.

A strategy passes a checkpoint plain tensors, which rank 0 writes, or :class:`Shard` objects, which each rank writes. It gets
back :class:`StoredTensor` objects: in memory, or read from several files on demand, independent of the saving strategy.
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
        shape: of the whole tensor.
        offsets: of the part, in each dimension.
        part: the values; None if this rank saves none, because it holds none or another rank saves the same.
    """

    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    part: Tensor | None


class StoredTensor(Protocol):
    """A tensor of a checkpoint that can be read by boxes. A ``Tensor`` in memory is one too."""

    @property
    def shape(self) -> torch.Size:
        """Shape of the whole tensor."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the values."""
        ...

    def __getitem__(self, box: tuple[slice, ...], /) -> Tensor:
        """Return the values within a box, on the CPU."""
        ...


class FileSlice(NamedTuple):
    """Location on disk of a box of a whole tensor.

    Args:
        file: in safetensors format.
        name: of the tensor in that file.
        offsets: of the box in the whole tensor, in each dimension.
        shape: of the box.
    """

    file: Path
    name: str
    offsets: tuple[int, ...]
    shape: tuple[int, ...]


class TensorOnDisk:
    """A tensor in one or several safetensors files; only the requested part is read."""

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
        """Return the same tensor, which gets these strides when it is read whole.

        Raises:
            ValueError: no dense tensor of its shape has these strides.
        """
        if not is_dense(self.shape, strides):
            raise ValueError(f"{list(strides)} are not the strides of a dense tensor of shape {tuple(self.shape)}")
        return TensorOnDisk(self.shape, self.dtype, self._pieces, strides)

    def __getitem__(self, box: tuple[slice, ...], /) -> Tensor:
        """Return the values within a box, on the CPU; trailing dimensions that the box omits are read whole."""
        bounds = [each.indices(size)[:2] for each, size in zip(box, self.shape, strict=False)]
        bounds += [(0, size) for size in self.shape[len(bounds) :]]
        result = torch.empty([max(0, stop - start) for start, stop in bounds], dtype=self.dtype)
        for piece in self._pieces if result.numel() else ():
            ends = [offset + size for offset, size in zip(piece.offsets, piece.shape, strict=True)]
            overlap = [
                (max(start, first), min(stop, end))
                for (start, stop), first, end in zip(bounds, piece.offsets, ends, strict=True)
            ]
            if any(start >= stop for start, stop in overlap):
                continue
            source = tuple(slice(a - first, b - first) for (a, b), first in zip(overlap, piece.offsets, strict=True))
            target = tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(overlap, bounds, strict=True))
            with safe_open(piece.file, framework="pt") as file:
                values = file.get_slice(piece.name)[source] if source else file.get_tensor(piece.name)
            result[target] = values
        return result


def is_stored(value: object) -> bool:
    """Return whether a value of a checkpoint's state is a tensor."""
    return isinstance(value, Tensor | TensorOnDisk)


def whole(stored: StoredTensor) -> Tensor:
    """Return a stored tensor whole; on the CPU if it is on disk."""
    if isinstance(stored, Tensor):
        return stored
    strides = getattr(stored, "strides", None)
    return stored[()] if strides is None else laid_out(stored[()], strides)


def in_memory(state: Any) -> Any:
    """Return nested state with every tensor on disk read into memory."""
    if isinstance(state, TensorOnDisk):
        return whole(state)
    if isinstance(state, Mapping):
        return {key: in_memory(value) for key, value in state.items()}
    if isinstance(state, list | tuple) and not hasattr(state, "_fields"):
        return type(state)(in_memory(value) for value in state)
    return state
