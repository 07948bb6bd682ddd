"""Divergence policies for steps that must not be applied: the gradient is not finite, or the loss jumped.

Decided before the update and from values that are equal on every rank, so all ranks do the same: stop, skip the update, or
return to a checkpoint and skip the batch.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from runtime.config.sections import DivergenceSection
from runtime.data.batches import Cursor, Window
from runtime.errors import DivergenceError

Policy = Literal["stop", "skip", "rollback"]

_ADVICE = (
    "Lower the learning rate, clip (optimizer.max_grad_norm), warm up (schedule.warmup_steps), check the data, "
    "or choose another policy (divergence)"
)


class RollbackWanted(Exception):  # noqa: N818  control flow, not an error
    """A step requires a rollback to the last good checkpoint. Raised on every rank.

    Args:
        reason: why.
        step: number of the step, counted from 1.
        cursor: its global batch.
    """

    def __init__(self, reason: str, step: int, cursor: Cursor) -> None:
        super().__init__(reason)
        self.reason, self.step, self.cursor = reason, step, cursor


class Divergence:
    """Detects diverged steps and applies the configured policies. Its state is part of the run's.

    Args:
        section: the configuration's section.
        sum_over_ranks: sums numbers of all ranks; called if spike detection is on. Collective.
        warn: called with a message about each skipped update.
    """

    def __init__(
        self,
        section: DivergenceSection,
        *,
        sum_over_ranks: Callable[[Sequence[float]], float],
        warn: Callable[[str], None],
    ) -> None:
        self._section = section
        self._sum_over_ranks = sum_over_ranks
        self._warn = warn
        self._losses: list[float] = []
        self._skips: list[int] = []  # the latest consecutive skipped steps

    def spike(self, losses: Callable[[], Sequence[float]]) -> str | None:
        """Return what is wrong with a step's loss, or None. Collective and waits for the device, if spike detection is on.

        Mean and standard deviation are those of the last ``window`` accepted losses; before there are that many, only a
        non-finite loss is reported.

        Args:
            losses: returns the share of each of this rank's slots in the step's mean loss.
        """
        spike = self._section.spike
        if spike is None:
            return None
        loss = self._sum_over_ranks(losses())
        if len(self._losses) >= spike.window or not math.isfinite(loss):
            mean = statistics.fmean(self._losses) if self._losses else math.nan
            sigma = statistics.pstdev(self._losses) if self._losses else math.nan
            if not math.isfinite(loss) or loss > mean + spike.sigma * max(sigma, 1e-12 * abs(mean)):
                return (
                    f"the loss jumped to {loss:.6g} (mean {mean:.6g}, standard deviation {sigma:.3g} of "
                    f"{len(self._losses)} steps)"
                )
        self._losses = [*self._losses[1 - spike.window :], loss] if spike.window > 1 else [loss]
        return None

    def decide(self, reason: str, window: Window, step: int, *, spike: bool) -> None:
        """Apply the policy to a diverged step; returns if its update is skipped.

        Args:
            step: number of the step, counted from 1.

        Raises:
            DivergenceError: the policy is to stop, or too many updates in a row were skipped.
            RollbackWanted: the policy is to return to a checkpoint.
        """
        section, cursor = self._section, window.cursor
        policy = section.spike.policy if spike and section.spike is not None else section.non_finite
        where = f"step {step} (epoch {cursor.epoch + 1}, batch {cursor.batch + 1}): {reason}"
        if policy == "stop":
            raise DivergenceError(
                f"{where}; it was not applied and the run stops. Resuming repeats this step from the last checkpoint. {_ADVICE}"
            )
        if policy == "rollback":
            raise RollbackWanted(reason, step, cursor)
        self._skips = [*self._skips, step] if self._skips and self._skips[-1] == step - 1 else [step]
        if len(self._skips) > section.max_skips:
            raise DivergenceError(
                f"{where}; {section.max_skips} updates in a row have been skipped before it (divergence.max_skips). {_ADVICE}"
            )
        self._warn(f"{where}; the update is skipped")

    def state_dict(self) -> dict[str, Any]:
        """Return the recent losses and the latest consecutive skipped steps."""
        return {"losses": list(self._losses), "skips": list(self._skips)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a state."""
        window = self._section.spike.window if self._section.spike is not None else 0
        self._losses, self._skips = list(state["losses"])[-window:] if window else [], list(state["skips"])
