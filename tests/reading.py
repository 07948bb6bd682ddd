"""Reads a run's batches as its ranks do, without a process group: each rank's windows, merged by slot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from runtime.data.batches import Cursor, SlotAssignment, Windows
from runtime.data.loading import loader_factory
from runtime.data.order import Order
from runtime.data.samples import Samples

START = Cursor()


def read_steps(
    source: Any,
    order: Callable[[], Order],
    *,
    world_size: int = 1,
    num_workers: int = 0,
    slots: int = 4,
    epochs: int = 2,
    start: Cursor = START,
    worker_init: Callable[[int], Any] | None = None,
    **options: Any,
) -> dict[Cursor, list[Any]]:
    """Return each global batch's collated slots, in order; each rank draws an order of its own."""
    steps: dict[Cursor, dict[int, Any]] = {}
    for rank in range(world_size):
        windows = Windows(
            Samples(source, seed=3, **options),
            order(),
            start=start,
            stop=lambda cursor, steps: cursor.epoch >= epochs,
            assignment=SlotAssignment(slots, world_size, rank),
            make_loader=loader_factory(
                num_workers=num_workers,
                prefetch_factor=2,
                pin_memory=False,
                timeout_seconds=60 if num_workers else 0,
                start_method=None,
                worker_init=worker_init,
            ),
        )
        for window in windows:
            found = steps.setdefault(window.cursor, {})
            found.update({m.slot: m.batch for m in window.microbatches if not m.filler})
    return {cursor: [slots[k] for k in sorted(slots)] for cursor, slots in steps.items()}


def equal(first: Any, second: Any) -> bool:
    """Compare batches bit for bit."""
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return list(first) == list(second) and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(equal(a, b) for a, b in zip(first, second, strict=True))
    return bool(first == second)
