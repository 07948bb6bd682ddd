"""Whether a batch has as many rows as samples were read for it: what divides a loss by samples must not divide by others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from runtime.data.batches import Window
from runtime.data.yielded_batches import tensors_of
from runtime.errors import DataError
from runtime.losses.supervised import PerSampleObjective
from runtime.objective import Objective


def miscounted(objective: Objective, batch: Any, samples: int) -> str:
    """Return, in one line, how a batch's rows are not its samples; empty if they are, or cannot be counted, or do not matter.

    They matter where the objective's weight is the number of samples.

    Raises:
        DataError: the objective has one loss a row, so the loss and its gradient would certainly be wrong.
    """
    if not objective.counts_samples:
        return ""
    rows = other_rows(batch, samples)
    if rows is None:
        return ""
    told = (
        f"a batch of {samples} samples has {rows} rows: data.collate (or the data set's __getitems__) drops samples or "
        f"makes more of them, and {type(objective).__name__} divides the loss by the number of samples: loss and gradient are "
        "wrong. Leave samples out of the data set, or let the objective count: weight(batch) returns what it sums over"
    )
    if isinstance(objective, PerSampleObjective):
        raise DataError(told)
    return told


def other_rows(batch: Any, samples: int) -> int | None:
    """Return how many rows a batch has if these are certainly not so many samples, else None.

    Rows are counted where all tensors agree in their first dimension. Sequences may have time first, so a tensor with as many
    samples in its second dimension is right as well.
    """
    shapes = [tensor.shape for tensor in tensors_of(batch) if tensor.ndim]
    rows = {shape[0] for shape in shapes}
    return rows.pop() if len(rows) == 1 and not any(samples in shape[:2] for shape in shapes) else None


def with_rows_checked(windows: Iterator[Window], objective: Objective, warn: Callable[[str], None]) -> Iterator[Window]:
    """Yield windows as they are, and warn of the first batch whose rows are not its samples.

    Raises:
        DataError: the loss would certainly be wrong.
    """
    for window in windows:
        told = next(
            (text for m in window.microbatches if not m.filler and (text := miscounted(objective, m.batch, m.samples))),
            "",
        )
        if told:
            warn(told)
        yield window
        if told:
            break
    yield from windows
