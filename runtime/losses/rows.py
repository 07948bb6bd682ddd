"""Check that a batch has one row per sample read for it, since losses are divided by the number of samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from runtime.data.batches import Window
from runtime.data.yielded_batches import tensors_of
from runtime.errors import DataError
from runtime.losses.supervised import PerSampleObjective
from runtime.objective import Objective


def row_mismatch(objective: Objective, batch: Any, samples: int) -> str:
    """Return a one-line warning if the number of rows is not ``samples``; empty if it is, is unknown, or does not matter.

    It matters where the objective's weight is the number of samples.

    Raises:
        DataError: the objective has one loss per row, so the loss and its gradient would certainly be wrong.
    """
    if not objective.counts_samples:
        return ""
    rows = mismatched_rows(batch, samples)
    if rows is None:
        return ""
    message = (
        f"a batch of {samples} samples has {rows} rows: data.collate (or the data set's __getitems__) drops or adds samples, "
        f"but {type(objective).__name__} divides the loss by the number of samples: loss and gradient are wrong. Filter "
        "samples in the data set instead, or give the objective a weight(batch) that returns the number it sums over"
    )
    if isinstance(objective, PerSampleObjective):
        raise DataError(message)
    return message


def mismatched_rows(batch: Any, samples: int) -> int | None:
    """Return the number of a batch's rows if it is certainly not ``samples``, else None.

    Rows are counted where all tensors agree in their first dimension. Sequences may have time first, so a tensor whose second
    dimension is ``samples`` is accepted too.
    """
    shapes = [tensor.shape for tensor in tensors_of(batch) if tensor.ndim]
    rows = {shape[0] for shape in shapes}
    return rows.pop() if len(rows) == 1 and not any(samples in shape[:2] for shape in shapes) else None


def with_rows_checked(windows: Iterator[Window], objective: Objective, warn: Callable[[str], None]) -> Iterator[Window]:
    """Yield windows unchanged, and warn of the first batch whose number of rows is not its number of samples.

    Raises:
        DataError: the loss would certainly be wrong.
    """
    for window in windows:
        warnings = (row_mismatch(objective, m.batch, m.samples) for m in window.microbatches if not m.filler)
        warning = next(filter(None, warnings), "")
        if warning:
            warn(warning)
        yield window
        if warning:
            break
    yield from windows
