"""Rules for streams that yield whole batches (``yields: batches``): the keys that they set, and those that they exclude."""

from __future__ import annotations

from typing import Any

from runtime.config.data import BatchSection, DataSection, SplitSection


def one_slot_each(values: Any) -> Any:
    """Fill in ``batch.micro_size`` and ``batch.slots`` of a raw configuration whose training data yields batches.

    Each yielded batch is one slot, so that its content and its seed depend on neither ranks nor workers.
    """
    try:
        yields_batches, batch = values["data"]["train"]["yields"] == "batches", values["batch"]
        size, micro_size, slots = batch["global_size"], batch.get("micro_size"), batch.get("slots")
    except (KeyError, TypeError, AttributeError):
        return values  # nothing to fill in, or validation reports what is wrong
    if not yields_batches or micro_size not in (None, 1) or slots not in (None, size):
        return values
    return {**values, "batch": {**batch, "micro_size": 1, "slots": size}}


def rules(
    data: DataSection, batch: BatchSection, predicted: SplitSection | None, *, micro_size: int | None
) -> list[tuple[Any, str, str]]:
    """Return the rules for streams that yield batches: (broken, key, message).

    Args:
        predicted: ``prediction.data``.
        micro_size: ``evaluation.micro_size``.
    """
    evaluated = [part for part in (data.validation, data.test, predicted) if part is not None]
    parts = [data.train, *evaluated]
    if all(part.yields == "samples" for part in parts):
        return []
    only_batches = all(part.yields == "batches" for part in parts)
    common: list[tuple[Any, str, str]] = [
        (
            data.collate is not None and only_batches,
            "data.collate",
            "makes a batch of samples, but the data yields whole batches (yields: batches); leave it out, or process each "
            "batch in data.train.transform, which is called with the yielded batch",
        ),
        (
            micro_size is not None and evaluated and all(part.yields == "batches" for part in evaluated),
            "evaluation.micro_size",
            "counts samples, but each yielded batch is one forward pass (yields: batches); leave it out",
        ),
    ]
    if data.train.yields == "samples":
        return common
    return [
        *common,
        (
            batch.micro_size not in (None, 1),
            "batch.micro_size",
            "must be 1 or left out: each batch that the stream yields is one forward pass (data.train.yields: batches)",
        ),
        (
            batch.slots not in (None, batch.global_size),
            "batch.slots",
            f"must be global_size ({batch.global_size}) or left out: each batch that the stream yields is one slot "
            "(data.train.yields: batches)",
        ),
        (
            micro_size is None and any(part.yields == "samples" for part in evaluated),
            "evaluation.micro_size",
            "is required here: the number of samples of one forward pass cannot be derived from a training stream that "
            "yields batches (data.train.yields)",
        ),
    ]
