"""Checks that a batch has one row for each requested sample, in the requested order.

A collate function may drop samples, make several rows of one, or sort them by length. Ids derived from the position in the
data set would then be written next to other samples' predictions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from runtime.data.yielded_batches import tensors_of
from runtime.errors import DataError
from runtime.losses.rows import mismatched_rows


def check_count(batch: Any, samples: int) -> None:
    """Refuse a batch whose number of rows is not the number of samples.

    Raises:
        DataError: the numbers differ.
    """
    rows = mismatched_rows(batch, samples)
    if rows is not None:
        raise DataError(
            f"a batch of {samples} samples to predict has {rows} rows: data.collate (or the data set's __getitems__) drops "
            "or multiplies samples, but each sample must have one prediction. Leave samples out of the data set, not of a "
            "batch"
        )


def check_order(batch: Any, alone: Sequence[Any]) -> None:
    """Refuse a batch whose rows are in another order than the samples.

    Args:
        alone: each sample as a batch of one.

    Raises:
        DataError: a row certainly belongs to another sample.
    """
    tensors_of_samples = [list(tensors_of(single)) for single in alone]
    for position, part in enumerate(tensors_of(batch)):
        if part.ndim == 0 or len(part) != len(alone):
            continue
        rows = [
            tensors[position]
            for tensors in tensors_of_samples
            if position < len(tensors) and len(tensors[position]) == 1
        ]
        if len(rows) < len(alone):
            continue
        matches = [[n for n, single in enumerate(rows) if _equal_rows(row, single[0])] for row in part]
        if all(len(samples) == 1 for samples in matches) and matches != [[n] for n in range(len(rows))]:
            raise DataError(
                "the rows of a batch to predict are in another order than the samples (perhaps data.collate, or the data "
                "set's __getitems__, sorts them), so predictions would be written next to other samples' ids: keep the order, "
                "or set data.fields.id to the part of the batch that identifies each row's sample"
            )


def _equal_rows(row: Tensor, single: Tensor) -> bool:
    """Return whether two rows are equal where both have values: one may be padded further."""
    if row.ndim != single.ndim or row.dtype != single.dtype:
        return False
    common = tuple(slice(0, min(sizes)) for sizes in zip(row.shape, single.shape, strict=True))
    return bool((row[common] == single[common]).all())
