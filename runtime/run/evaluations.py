"""The evaluations of a run: when they are due, with which weights, their results, and interrupted ones to be caught up.

The evaluation at the end of a run informs the user. Unless it is also due by ``evaluation.every``, it decides nothing: a run
started with a higher limit would not have made it.
"""

from __future__ import annotations

from collections.abc import Mapping

from runtime.build.builder import Builder
from runtime.build.evaluation import build_averaged_evaluation, build_evaluator
from runtime.build.preparation import RunComponents
from runtime.checks.settings import check_changed_settings
from runtime.data.batches import Window
from runtime.evaluation.evaluator import Evaluator
from runtime.evaluation.metrics import Result
from runtime.optimization.optimizer_eval_mode import evaluated_weights
from runtime.run.services import RunServices
from runtime.strategies import Strategy
from runtime.training.triggers import Triggers


class Evaluations:
    """Evaluates validation and test data as configured. Collective: every rank must call its methods.

    Attributes:
        results: of the last evaluation of the validation data, and with prefix ``test/`` of the test data; equal on every rank.
        judged: whether the last evaluation of the validation data was due by ``evaluation.every``, so that it may decide.
    """

    def __init__(
        self,
        builder: Builder,
        prepared: RunComponents,
        strategy: Strategy,
        triggers: Triggers,
        services: RunServices,
    ) -> None:
        self._builder = builder
        self._every = builder.values.evaluation.every
        self._triggers, self._state, self._progress = triggers, prepared.state, prepared.state.progress
        self._services = services
        slots, closing = prepared.assignment.slots, services.closing
        self._validation = build_evaluator(builder, strategy, "validation", slots=slots, closing=closing)
        self._test = build_evaluator(builder, strategy, "test", slots=slots)
        self._weights = build_averaged_evaluation(
            builder, prepared, strategy, closing=closing, enter=self._report_alive, log=services.reporter.message
        )
        self.results: dict[str, Result] = {}
        self.judged = True
        self._step = -1

    def resume_from(self, results: Mapping[str, Result], *, judged: bool) -> None:
        """Restore the results stored in a checkpoint; empty if its step was not evaluated.

        Raises:
            ConfigurationError: ``mode`` of a watched result was changed to the wrong direction (``checks: on``).
        """
        if self._builder.values.checks == "on":
            check_changed_settings(self._builder)
        self.results, self.judged = dict(results), judged
        self._step = self._progress.step if results else -1

    @property
    def evaluators(self) -> dict[str, Evaluator]:
        """The evaluators by split; only those configured."""
        splits = {"validation": self._validation, "test": self._test}
        return {split: evaluator for split, evaluator in splits.items() if evaluator is not None}

    @property
    def results_of_this_step(self) -> dict[str, Result]:
        """Results of the current weights, if they were evaluated."""
        return self.results if self._step == self._progress.step else {}

    @property
    def judged_results_of_this_step(self) -> dict[str, Result]:
        """Results of the current weights, if they were evaluated and the results may decide."""
        return self.results_of_this_step if self.judged else {}

    def after_step(self, window: Window) -> dict[str, Result] | None:
        """Evaluate the validation data if due, and return the results if they may decide.

        None if it is not due, was interrupted, or is due only because the run ends.
        """
        if not self._triggers.is_due(self._every, window) or not (self._validation or window.run_ends):
            return None
        judged = self._triggers.is_due_by_interval(self._every, window)
        results = self._validate(judged=judged)
        return results if judged else None

    def _validate(self, *, judged: bool) -> dict[str, Result] | None:
        """Evaluate, or record that the evaluation was interrupted and must be repeated."""
        results = self._evaluated(self._validation, judged=judged)
        self._progress.evaluation_due = results is None
        self._progress.evaluation_extra = results is None and not judged
        if results:
            self.results, self.judged, self._step = results, judged, self._progress.step
            self._report("validation", results)
        return results

    def update_early_stopping(self, results: Mapping[str, Result]) -> None:
        """Update early stopping with results; they are equal on every rank."""
        if self._state.early_stopping is not None:
            self._state.early_stopping.after_evaluation(results, self._progress.step)

    def catch_up(self) -> bool:
        """Repeat the evaluation that was interrupted by a stop; return whether it was completed."""
        judged = not self._progress.evaluation_extra
        results = self._validate(judged=judged)
        if results is None:
            return False
        if judged:
            self._state.schedule.after_evaluation(results)
            self.update_early_stopping(results)
        return True

    def test(self) -> bool:
        """Evaluate the test data, if any; return False if interrupted. The results are not stored in checkpoints."""
        if self._test is None:
            return True
        results = self._evaluated(self._test, judged=False)
        if results is None:
            return False
        self._report("test", results)
        self.results = {**self.results, **{f"test/{name}": value for name, value in results.items()}}
        return True

    def _report(self, split: str, results: Mapping[str, Result]) -> None:
        self._services.reporter.log(results, step=self._progress.step, epoch=self._progress.epoch, split=split)

    def _evaluated(self, evaluator: Evaluator | None, *, judged: bool) -> dict[str, Result] | None:
        self._report_alive()

        def before_round() -> bool:
            self._report_alive()
            return self._services.stop_requested()

        with evaluated_weights(self._state.optimizer), self._services.garbage.paused():
            return self._weights.evaluate(
                evaluator, self._progress, extra=not judged, last=self._triggers.over, stop_requested=before_round
            )

    def _report_alive(self) -> None:
        self._services.times.enter("evaluate", self._progress.step)  # an evaluation may take long
