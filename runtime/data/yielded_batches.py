"""Whole batches yielded by a stream (``yields: batches``): their number of samples, and slices of rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from runtime.data.fields import Fields
from runtime.errors import DataError, ObjectiveError


def rows_of(batch: Any, fields: Fields) -> int:
    """Return the number of samples in a batch: the first dimension of its tensors.

    If tensors differ in it (all samples' words in one tensor, and offsets of the samples in another), that of the target
    is used, since losses have a term for each of its rows; without a target, that of the model's inputs. For a batch of a
    custom class it is its length.

    Raises:
        DataError: the batch has no samples, or their number cannot be determined.
    """
    rows = _agreed(batch)
    for part in (_target, _inputs) if rows is None else ():
        rows = _agreed(part(batch, fields)) if rows is None else rows
    if rows is None:
        raise DataError(
            f"its number of samples cannot be determined, since {_described(batch)} (yields: batches). Samples are the first "
            "dimension of a batch's tensors; if these differ, that of the target (data.fields.target). A batch of a custom "
            "class needs __len__; data.train.transform can convert it to tensors"
        )
    if rows == 0:
        raise DataError("it has no samples (yields: batches); the stream must not yield empty batches")
    return rows


def rows_from(batch: Any, start: int, stop: int, *, rows: int) -> Any:
    """Return rows ``start`` to ``stop`` of a batch; None if any part is not a tensor or list with ``rows`` rows."""
    if isinstance(batch, Tensor):
        return batch[start:stop] if batch.ndim and batch.size(0) == rows else None
    if isinstance(batch, Mapping):
        parts = {key: rows_from(part, start, stop, rows=rows) for key, part in batch.items()}
        return None if any(part is None for part in parts.values()) else parts
    if isinstance(batch, list | tuple):
        if len(batch) == rows and not any(True for _ in tensors_of(batch)):
            return batch[start:stop]
        several = [rows_from(part, start, stop, rows=rows) for part in batch]
        return None if any(part is None for part in several) else several
    return None


def _target(batch: Any, fields: Fields) -> Any:
    try:
        return fields.target_of(batch)
    except ObjectiveError:  # the batch has no target
        return None


def _inputs(batch: Any, fields: Fields) -> Any:
    try:
        return fields.arguments(batch)
    except ObjectiveError:
        return None


def _agreed(value: Any) -> int | None:
    """Return the first dimension common to all tensors, or the length of a custom class; None if they differ."""
    if not isinstance(value, Tensor | Mapping | list | tuple | str | bytes) and hasattr(value, "__len__"):
        return len(value)
    sizes = {tensor.size(0) for tensor in tensors_of(value) if tensor.ndim}
    return sizes.pop() if len(sizes) == 1 else None


def _described(batch: Any) -> str:
    shapes = [str(tuple(tensor.shape)) for tensor in tensors_of(batch) if not tensor.is_nested]
    if not shapes:
        return f"it is a {type(batch).__name__} without tensors"
    return f"its tensors have the shapes {', '.join(shapes[:6])}{', …' * (len(shapes) > 6)}"


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of a batch, however nested."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_of(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_of(part)
