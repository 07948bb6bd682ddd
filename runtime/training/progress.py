"""Progress counters of a run; stored in checkpoints and equal on every rank."""

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
        epoch: of the last step, counted from 1; the cursor may already be past skipped batches of the next epoch.
        skipped_steps: steps whose update was not applied.
        skipped_batches: global batches that rollbacks skip.
        cursor: the next global batch.
        attempt: number of the attempt; incremented by a rollback.
        evaluation_due: the evaluation after this step was interrupted and must be repeated.
        evaluation_extra: that evaluation is due only because the run ended, so its results decide nothing.
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
        """Count a step's update as applied or skipped."""
        if applied:
            self.updates += 1
        else:
            self.skipped_steps.append(step)

    def state_dict(self) -> dict[str, Any]:
        """Return the counters as plain data."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a state."""
        for name, value in state.items():
            setattr(self, name, value)
        self.cursor = Cursor(*state["cursor"])
        self.skipped_steps = list(state["skipped_steps"])
        self.skipped_batches = [Cursor(*cursor) for cursor in state["skipped_batches"]]
