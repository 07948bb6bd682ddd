"""How far a run has come: what the checkpoint holds and every rank agrees on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from runtime.batches import Cursor, Window


@dataclass
class Progress:
    """The counters of a run.

    Args:
        step: global batches consumed, whether or not their update was applied.
        updates: updates applied.
        samples: samples consumed.
        skipped_steps: steps whose update was not applied.
        cursor: the next global batch.
        attempt: which line of history this is.
    """

    step: int = 0
    updates: int = 0
    samples: int = 0
    skipped_steps: list[int] = field(default_factory=list)
    cursor: Cursor = field(default_factory=Cursor)
    attempt: int = 0

    def advance(self, window: Window, *, applied: bool) -> None:
        """Count one step."""
        self.step += 1
        self.samples += window.samples
        self.cursor = window.next_cursor
        if applied:
            self.updates += 1
        else:
            self.skipped_steps.append(self.step)

    def state_dict(self) -> dict[str, Any]:
        """Return the counters as plain data."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        for name, value in state.items():
            setattr(self, name, Cursor(*value) if name == "cursor" else value)
