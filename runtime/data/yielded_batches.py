"""Batches that a stream yields whole (``yields: batches``): how many samples each has, and parts of one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from runtime.data.fields import Fields
from runtime.errors import DataError, ObjectiveError


def rows_of(batch: Any, fields: Fields) -> int:
    """Return how many samples a batch has: the first dimension of its tensors.

    Where tensors differ in it (all samples' words in one tensor, and where each sample begins), that of the target counts,
    since losses have a term for each row of it; without a target, that of what the model is called with. A batch of a class
    of its own is asked for its length.

    Raises:
        DataError: the batch has no samples, or their number cannot be told.
    """
    rows = _agreed(batch)
    for part in (_target, _inputs) if rows is None else ():
        rows = _agreed(part(batch, fields)) if rows is None else rows
    if rows is None:
        raise DataError(
            f"how many samples it has cannot be told, since {_described(batch)} (yields: batches). Samples are the first "
            "dimension of a batch's tensors; where they differ, that of the target (data.fields.target). A batch of a class of "
            "your own needs __len__; data.train.transform can make tensors of it"
        )
    if rows == 0:
        raise DataError("it has no samples (yields: batches); let the stream leave empty batches out")
    return rows


def rows_from(batch: Any, start: int, stop: int, *, rows: int) -> Any:
    """Return some rows of a batch of nothing but tensors and lists of so many rows; None where it has other parts."""
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
    except ObjectiveError:  # there is none
        return None


def _inputs(batch: Any, fields: Fields) -> Any:
    try:
        return fields.arguments(batch)
    except ObjectiveError:
        return None


def _agreed(value: Any) -> int | None:
    """Return the first dimension of all tensors, or the length of what holds none; None if they differ or there is none."""
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
    """Yield the tensors of a batch, nested as it is."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_of(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_of(part)
