"""Python's garbage collector on a schedule: at the same steps on every rank, where no rank keeps the others waiting.

Left to itself it runs when a count of allocations says so, on each rank at another moment, and every rank then waits for
the one that collects; a full collection searches all that was ever imported (0.1 s).
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_STEPS_BETWEEN = 50
_STEPS_BETWEEN_FULL = 1000


class GarbageCollection:
    """Takes the collector over inside ``with``; what exists on entering is never searched there."""

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
        """Collect what has become garbage, if it is time."""
        if step % _STEPS_BETWEEN == 0:
            gc.collect(2 if step % _STEPS_BETWEEN_FULL == 0 else 1)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the collector to itself, for what takes long and counts no steps (an evaluation)."""
        if self._enabled:
            gc.enable()
        try:
            yield
        finally:
            gc.disable()
