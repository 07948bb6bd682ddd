"""Whether the rows of a batch to predict are the samples that were asked for: as many, and in their order.

A collate function may leave samples out, make several rows of one, or sort them by length. Ids that follow from the place in
the data set would then be written beside other samples' predictions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from runtime.data.yielded_batches import tensors_of
from runtime.errors import DataError
from runtime.losses.rows import mismatched_rows


def check_count(batch: Any, samples: int) -> None:
    """Refuse a batch of another number of rows than samples.

    Raises:
        DataError: naming both.
    """
    rows = mismatched_rows(batch, samples)
    if rows is not None:
        raise DataError(
            f"a batch of {samples} samples to predict has {rows} rows: data.collate (or the data set's __getitems__) drops "
            "samples or makes more of them, and each sample is to have one prediction. Leave samples out of the data set, "
            "not of a batch"
        )


def check_order(batch: Any, alone: Sequence[Any]) -> None:
    """Refuse a batch whose rows are in another order than the samples.

    Args:
        alone: each sample as a batch of its own.

    Raises:
        DataError: some row is certainly another sample's.
    """
    of_samples = [list(tensors_of(single)) for single in alone]
    for place, part in enumerate(tensors_of(batch)):
        if part.ndim == 0 or len(part) != len(alone):
            continue
        own = [tensors[place] for tensors in of_samples if place < len(tensors) and len(tensors[place]) == 1]
        if len(own) < len(alone):
            continue
        matches = [[n for n, single in enumerate(own) if _same(row, single[0])] for row in part]
        if all(len(found) == 1 for found in matches) and matches != [[n] for n in range(len(own))]:
            raise DataError(
                "the rows of a batch to predict are in another order than the samples (data.collate, or the data set's "
                "__getitems__, sorts them, say), so that predictions would be written beside other samples' places: keep the "
                "order, or let data.fields.id name a part of the batch that says which sample a row is"
            )


def _same(row: Tensor, single: Tensor) -> bool:
    """Tell whether two rows are equal where both have values: one may be padded further."""
    if row.ndim != single.ndim or row.dtype != single.dtype:
        return False
    common = tuple(slice(0, min(sizes)) for sizes in zip(row.shape, single.shape, strict=True))
    return bool((row[common] == single[common]).all())
