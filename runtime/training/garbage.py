"""Run Python's garbage collector on a schedule: at the same steps on every rank, so that ranks do not wait for one another.

By default it runs after a number of allocations, at a different time on each rank, and all ranks then wait for the one that
collects; a full collection searches everything ever imported (0.1 s).
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_STEPS_BETWEEN = 50
_STEPS_BETWEEN_FULL = 1000


class GarbageCollection:
    """Controls the collector inside ``with``; objects that exist on entering are never searched there."""

    def __enter__(self) -> GarbageCollection:
        self._enabled = gc.isenabled()
        gc.freeze()
        gc.disable()
        return self

    def __exit__(self, *error: object) -> None:
        gc.unfreeze()
        if self._enabled:
            gc.enable()

    def after_step(self, step: int) -> None:
        """Collect garbage, if due."""
        if step % _STEPS_BETWEEN == 0:
            gc.collect(2 if step % _STEPS_BETWEEN_FULL == 0 else 1)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Re-enable automatic collection, for long work without steps (an evaluation)."""
        if self._enabled:
            gc.enable()
        try:
            yield
        finally:
            gc.disable()
