"""Which weights are evaluated: the raw ones, or their average with BatchNorm statistics of its own."""

from __future__ import annotations

from collections.abc import Callable

from runtime.evaluation.evaluator import Evaluator
from runtime.evaluation.metrics import Result
from runtime.optimization.averaging import WeightAverage
from runtime.optimization.batch_statistics import BatchStatistics
from runtime.training.progress import Progress


class AveragedEvaluation:
    """Evaluates the average where there is one and it is asked for, otherwise the raw weights.

    Args:
        average: the run's, if it has one.
        wanted: whether the average is what is evaluated.
        statistics: computes what the average lacks; None only if that is nothing.
        tell: told once from where on the average is evaluated.
    """

    def __init__(
        self,
        average: WeightAverage | None,
        *,
        wanted: bool,
        statistics: BatchStatistics | None,
        tell: Callable[[str], None],
    ) -> None:
        self._average = average
        self._wanted = wanted
        self._statistics = statistics
        self._tell: Callable[[str], None] | None = tell

    def evaluate(
        self,
        evaluator: Evaluator | None,
        progress: Progress,
        *,
        last: Callable[[], bool],
        stop_wished: Callable[[], bool],
    ) -> dict[str, Result] | None:
        """Return an evaluation's results, none without an evaluator; None if it was cut short.

        Collective: every rank must call this.

        Args:
            last: tells whether the run ends here; the average then gets its statistics even if it is not evaluated.
            stop_wished: not asked where nothing is evaluated: there would be no evaluation to catch up with.
        """
        if evaluator is None:
            stop_wished = _never
        average = self._average
        if average is None or average.count == 0:
            return evaluator.evaluate(stop_wished) if evaluator is not None else {}
        if average.lacks_statistics and (self._wanted or last()) and not self._computed(average, progress, stop_wished):
            return None
        if evaluator is None:
            return {}
        if not self._wanted:
            return evaluator.evaluate(stop_wished)
        if self._tell is not None:
            self._tell(f"From step {progress.step} on the averaged weights are evaluated.")
            self._tell = None
        with average.swapped_in():
            return evaluator.evaluate(stop_wished)

    def _computed(self, average: WeightAverage, progress: Progress, stop_wished: Callable[[], bool]) -> bool:
        assert self._statistics is not None
        with average.swapped_in():
            statistics = self._statistics.compute(
                progress.epoch - 1, skipped=progress.skipped_batches, stop_wished=stop_wished
            )
        if statistics is not None:
            average.take_statistics(statistics)
        return statistics is not None


def _never() -> bool:
    return False
