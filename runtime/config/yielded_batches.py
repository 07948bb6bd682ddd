"""Rules for streams that yield whole batches (``yields: batches``): which other keys they set, and which they exclude."""

from __future__ import annotations

from typing import Any

from runtime.config.data import BatchSection, DataSection, SplitSection


def one_slot_each(values: Any) -> Any:
    """Fill in ``batch.micro_size`` and ``batch.slots`` of a raw configuration whose training data yields batches.

    Each yielded batch is one slot, so that its content and its seed depend on neither ranks nor workers.
    """
    try:
        wanted, batch = values["data"]["train"]["yields"] == "batches", values["batch"]
        size, micro_size, slots = batch["global_size"], batch.get("micro_size"), batch.get("slots")
    except (KeyError, TypeError, AttributeError):
        return values  # there are none, or validation tells what is wrong
    if not wanted or micro_size not in (None, 1) or slots not in (None, size):
        return values
    return {**values, "batch": {**batch, "micro_size": 1, "slots": size}}


def rules(
    data: DataSection, batch: BatchSection, predicted: SplitSection | None, *, micro_size: int | None
) -> list[tuple[Any, str, str]]:
    """Return what does not go with streams that yield batches: (broken, key, what is wrong).

    Args:
        predicted: ``prediction.data``.
        micro_size: that of ``evaluation``.
    """
    evaluated = [part for part in (data.validation, data.test, predicted) if part is not None]
    parts = [data.train, *evaluated]
    if all(part.yields == "samples" for part in parts):
        return []
    only_batches = all(part.yields == "batches" for part in parts)
    found: list[tuple[Any, str, str]] = [
        (
            data.collate is not None and only_batches,
            "data.collate",
            "makes a batch of samples, and the data yields whole batches (yields: batches); leave it out, or make each batch "
            "what it should be in data.train.transform, which is called with the yielded batch",
        ),
        (
            micro_size is not None and evaluated and all(part.yields == "batches" for part in evaluated),
            "evaluation.micro_size",
            "counts samples, and each yielded batch is one forward pass (yields: batches); leave it out",
        ),
    ]
    if data.train.yields == "samples":
        return found
    return [
        *found,
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
            "is required here: how many samples one forward pass takes does not follow from a training stream that yields "
            "batches (data.train.yields)",
        ),
    ]
