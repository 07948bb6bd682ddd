"""Evaluate the raw weights, or their average with recomputed BatchNorm statistics."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from runtime.evaluation.batch_statistics import BatchStatistics
from runtime.evaluation.evaluator import Evaluator
from runtime.evaluation.metrics import Result
from runtime.optimization.averaging import WeightAverage
from runtime.training.progress import Progress


class AveragedEvaluation:
    """Evaluates the average if there is one and it is configured, otherwise the raw weights.

    Args:
        average: the run's, if it has one.
        wanted: whether to evaluate the average.
        may_end: whether any evaluation may be the run's last (early stopping).
        statistics: computes the average's BatchNorm statistics; None if it needs none.
        log: called once, with a message naming the step from which on the average is evaluated.
    """

    def __init__(
        self,
        average: WeightAverage | None,
        *,
        wanted: bool,
        may_end: bool,
        statistics: BatchStatistics | None,
        log: Callable[[str], None],
    ) -> None:
        self._average = average
        self._wanted, self._may_end = wanted, may_end
        self._statistics = statistics
        self._log: Callable[[str], None] | None = log

    def evaluate(
        self,
        evaluator: Evaluator | None,
        progress: Progress,
        *,
        extra: bool,
        last: bool,
        stop_requested: Callable[[], bool],
    ) -> dict[str, Result] | None:
        """Return an evaluation's results, empty without an evaluator; None if it was interrupted.

        Collective: every rank must call this.

        Args:
            extra: the evaluation decides nothing. Statistics computed for it belong to this state only: a run that resumes
                from here continues without them.
            last: whether the run ends here; the average then gets its statistics even if it is not evaluated.
            stop_requested: not called without an evaluator: there would be no evaluation to catch up on.
        """
        if evaluator is None:
            stop_requested = _never
        average = self._average
        if average is None or average.count == 0:
            return evaluator.evaluate(stop_requested) if evaluator is not None else {}
        always = self._wanted or self._may_end  # whether every evaluation computes statistics
        if average.lacks_statistics and (always or last):
            statistics = self._computed(average, progress, stop_requested)
            if statistics is None:
                return None
            average.set_statistics(statistics, lasting=always and not extra)
        if evaluator is None:
            return {}
        if not self._wanted:
            return evaluator.evaluate(stop_requested)
        if self._log is not None:
            self._log(f"From step {progress.step} on the averaged weights are evaluated.")
            self._log = None
        with average.swapped_in():
            return evaluator.evaluate(stop_requested)

    def _computed(
        self, average: WeightAverage, progress: Progress, stop_requested: Callable[[], bool]
    ) -> dict[str, Tensor] | None:
        assert self._statistics is not None
        with average.swapped_in():
            return self._statistics.compute(
                progress.epoch - 1, skipped=progress.skipped_batches, stop_requested=stop_requested
            )


def _never() -> bool:
    return False
