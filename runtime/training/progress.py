"""How far a run has come: what the checkpoint holds and every rank agrees on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from runtime.data.batches import Cursor, Window


@dataclass
class Progress:
    """The counters of a run.

    Args:
        step: global batches consumed, whether or not their update was applied.
        updates: updates applied.
        samples: samples consumed.
        epoch: of the last step, counted from 1; the cursor may be past batches of the next that are left out.
        skipped_steps: steps whose update was not applied.
        skipped_batches: global batches that rollbacks have left out.
        cursor: the next global batch.
        attempt: which line of history this is; raised by a rollback.
        evaluation_due: the evaluation after this step was cut short and is still to come.
        evaluation_extra: only the end of the run asked for that evaluation, so nothing is decided by its results.
    """

    step: int = 0
    updates: int = 0
    samples: int = 0
    epoch: int = 1
    skipped_steps: list[int] = field(default_factory=list)
    skipped_batches: list[Cursor] = field(default_factory=list)
    cursor: Cursor = field(default_factory=Cursor)
    attempt: int = 0
    evaluation_due: bool = False
    evaluation_extra: bool = False

    def advance(self, window: Window) -> None:
        """Count one step."""
        self.step += 1
        self.samples += window.samples
        self.epoch = window.cursor.epoch + 1
        self.cursor = window.next_cursor

    def settle(self, step: int, *, applied: bool) -> None:
        """Count what became of a step's update."""
        if applied:
            self.updates += 1
        else:
            self.skipped_steps.append(step)

    def state_dict(self) -> dict[str, Any]:
        """Return the counters as plain data."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        for name, value in state.items():
            setattr(self, name, value)
        self.cursor = Cursor(*state["cursor"])
        self.skipped_steps = list(state["skipped_steps"])
        self.skipped_batches = [Cursor(*cursor) for cursor in state["skipped_batches"]]
