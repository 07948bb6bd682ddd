"""What follows once it is known whether a step's update was applied: counters, schedule, average, policy.

On a CPU that is known at once. A GPU skips by itself where the gradient is not finite, and tells later: the verdict of a step
is then read before the update of the next, when it has long arrived, so the host never waits for the device.
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
    losses: dict[str, Tensor]


class StepOutcomes:
    """Settles steps in their order, each before the next update: the parameters are still those that it left.

    Attributes:
        applied: whether the update of the step that was added last was applied; None as long as only the device knows.

    Raises from every method but the constructor:
        DivergenceError: a gradient was not finite and the policy is to stop; parameters are as they were before it.
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
        """Take in the step that was just counted; settle it at once if what became of it is known."""
        step, losses = self._progress.step, self._meter.end_step()
        if isinstance(update.skipped, bool):
            self._settle(window, update, step, losses)
        else:
            self._open = _OpenStep(window, update, step, losses)
            self.applied = None

    def settle(self) -> None:
        """Let the step's consequences follow, if they have not yet. Waits for the device, for a flag of the step itself."""
        if self._open is not None:
            settled, self._open = self._open, None
            self._settle(*settled)

    def _settle(self, window: Window, update: Update, step: int, losses: dict[str, Tensor]) -> None:
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
