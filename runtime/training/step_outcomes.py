"""Bookkeeping after an update is known to be applied or skipped: counters, schedule, average, divergence policy.

On a CPU this is known at once. A GPU itself skips the update if the gradient is not finite, and the host learns it later: the
flag is read before the update of the next step, when it has long arrived, so the host never waits for the device.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from runtime.data.batches import Window
from runtime.optimization.averaging import WeightAverage
from runtime.optimization.schedule import Schedule
from runtime.reporting.meters import TrainingMeter
from runtime.strategies.update import Update
from runtime.training.divergence import Divergence
from runtime.training.progress import Progress


class _OpenStep(NamedTuple):
    window: Window
    update: Update
    step: int
    losses: dict[str, list[Tensor]]


class StepOutcomes:
    """Settles steps in order, each before the next update, while the parameters are still those after the step.

    Attributes:
        applied: whether the update of the last added step was applied; None while only the device knows.

    Raises (all methods but the constructor):
        DivergenceError: a gradient was not finite and the policy is to stop; parameters are unchanged since before it.
        RollbackWanted: a gradient was not finite and the policy is to return to a checkpoint.
    """

    def __init__(
        self,
        *,
        schedule: Schedule,
        averaging: WeightAverage | None,
        divergence: Divergence,
        progress: Progress,
        meter: TrainingMeter,
    ) -> None:
        self._schedule, self._averaging = schedule, averaging
        self._divergence, self._progress, self._meter = divergence, progress, meter
        self._open: _OpenStep | None = None
        self.applied: bool | None = None

    def add(self, window: Window, update: Update) -> None:
        """Add the step just counted; settle it at once if its outcome is known."""
        step, losses = self._progress.step, self._meter.end_step()
        if isinstance(update.skipped, bool):
            self._settle(window, update, step, losses)
        else:
            self._open = _OpenStep(window, update, step, losses)
            self.applied = None

    def settle(self) -> None:
        """Settle the open step, if any. Waits for the device, for the step's flag only."""
        if self._open is not None:
            settled, self._open = self._open, None
            self._settle(*settled)

    def _settle(self, window: Window, update: Update, step: int, losses: dict[str, list[Tensor]]) -> None:
        self.applied = applied = not update.skipped
        if not applied and update.diverged_if_skipped:
            self._divergence.decide("the gradient is NaN or infinite", window, step, spike=False)
        self._progress.settle(step, applied=applied)
        self._meter.settle(window, losses, applied=applied, grad_norm=update.grad_norm)
        if applied:
            self._schedule.after_update()
            if self._averaging is not None:
                self._averaging.update()
        if window.epoch_ends:
            self._schedule.after_epoch()
            if self._averaging is not None:
                self._averaging.after_epoch()
