"""When something is due after a step, and why a run ends; equal on every rank."""

from __future__ import annotations

from collections.abc import Callable

from runtime.config.sections import LimitSection
from runtime.config.types import Interval
from runtime.data.batches import Cursor, Window
from runtime.data.training_data import TrainingData
from runtime.training.early_stopping import EarlyStopping
from runtime.training.progress import Progress
from runtime.training.stop_reason import StopReason


class Triggers:
    """Intervals and limits over a run's progress.

    Args:
        limit: the configuration's section.
        intervals: of all actions that may be due after a step and depend on its outcome.
        data: determines the next global batch.
    """

    def __init__(
        self,
        limit: LimitSection,
        intervals: tuple[Interval, ...],
        *,
        data: TrainingData,
        progress: Progress,
        early_stopping: EarlyStopping | None,
    ) -> None:
        self._limit, self._intervals = limit, intervals
        self._step_counts = [every.count for every in intervals if every.unit == "step"]
        self._data, self._progress, self._early_stopping = data, progress, early_stopping

    def is_due(self, every: Interval, window: Window, *, ahead: int = 0) -> bool:
        """Whether an interval is due after this window's step, which is counted already unless ``ahead``.

        At the end of the run everything is due, whatever the interval.
        """
        return window.run_ends or self.is_due_by_interval(every, window, ahead=ahead)

    def is_due_by_interval(self, every: Interval, window: Window, *, ahead: int = 0) -> bool:
        """Whether an interval would be due after this window's step if the run did not end there.

        Only what is due by its interval may affect training: the end of a run can be moved later.
        """
        return every.due(step=self._progress.step + ahead, epoch=window.cursor.epoch + 1, epoch_ends=window.epoch_ends)

    def is_anything_due(self, window: Window) -> bool:
        """Whether anything is due after this window's step, which is counted already."""
        if window.run_ends or window.epoch_ends:
            return any(self.is_due(every, window) for every in self._intervals)
        step = self._progress.step
        return any(step % count == 0 for count in self._step_counts)  # called at every step

    def stop_reason(self, *, asked: bool = False) -> StopReason | None:
        """Return why the run ends here, between two steps, or None if it continues; equal on every rank.

        The only place that decides this, at a start and after a step. Only a diverged step ends a run elsewhere: it raises.

        Args:
            asked: the ranks have agreed to stop, or interrupted an evaluation in order to stop.
        """
        if self._early_stopping is not None and self._early_stopping.exhausted:
            return StopReason.EARLY_STOPPING
        if asked:
            return StopReason.STOP_REQUEST
        return self.limit if self._limit_reached() else None

    @property
    def limit(self) -> StopReason:
        """Which limit the run has."""
        return StopReason.STEP_LIMIT if self._limit.steps is not None else StopReason.EPOCH_LIMIT

    @property
    def over(self) -> bool:
        """Whether no training is left: the limit is reached, or the run stopped early."""
        return self.stop_reason() is not None

    @property
    def why_early(self) -> str:
        """Why the run ends before its limit; empty if it does not."""
        stopping = self._early_stopping
        if stopping is None or not stopping.exhausted or self._limit_reached():
            return ""
        return f"stopped early, after step {self._progress.step}: {stopping.reason}"

    @property
    def finished_message(self) -> str:
        """Message for a run that is already finished when it is started."""
        early = self.why_early
        key = "limit.early_stopping.patience" if early else "limit.epochs or limit.steps"
        return f"This run is finished: {early or f'{self._progress.step} steps'}. To continue, raise {key}."

    def limit_from_here(self) -> Callable[[Cursor, int], bool]:
        """Return a predicate ``(cursor, steps ahead) -> limit reached``."""
        limit, step = self._limit, self._progress.step
        if limit.steps is not None:
            last = limit.steps
            return lambda cursor, steps: step + steps >= last
        return lambda cursor, steps: cursor.epoch >= (limit.epochs or 0)

    def _limit_reached(self) -> bool:
        cursor = self._data.upcoming(self._progress.cursor, self._progress.skipped_batches)
        return self.limit_from_here()(cursor, 0)
