"""The evaluations of a run: when they are due, of which weights, what they found, what was cut short and is still to come.

The evaluation that is made because the run ends informs the user. Unless it is due by ``evaluation.every`` as well, nothing
follows from it: a run whose limit is raised would not have made it had it gone on at once.
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
    """Evaluates validation and test data as the run's configuration asks. Collective: every rank calls alike.

    Attributes:
        results: of the last evaluation of the validation data, and behind ``test/`` of the test data; equal on every rank.
        judged: whether the last evaluation of the validation data was due by ``evaluation.every``, so that it decides.
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
            builder, prepared, strategy, closing=closing, enter=self._statistics_go_on, log=services.reporter.message
        )
        self.results: dict[str, Result] = {}
        self.judged = True
        self._step = -1

    def go_on_from(self, results: Mapping[str, Result], *, judged: bool) -> None:
        """Take over what a checkpoint's step was found to give; empty where it was not evaluated.

        Raises:
            ConfigurationError: what is judged was changed to what cannot be meant (``checks: on``).
        """
        if self._builder.values.checks == "on":
            check_changed_settings(self._builder)
        self.results, self.judged = dict(results), judged
        self._step = self._progress.step if results else -1

    @property
    def evaluators(self) -> dict[str, Evaluator]:
        """What is evaluated, by the name of the split."""
        found = {"validation": self._validation, "test": self._test}
        return {split: evaluator for split, evaluator in found.items() if evaluator is not None}

    @property
    def results_of_this_step(self) -> dict[str, Result]:
        """Results of the weights as they are now, if they were evaluated."""
        return self.results if self._step == self._progress.step else {}

    @property
    def judged_results_of_this_step(self) -> dict[str, Result]:
        """Results of the weights as they are now, if they were evaluated and the results may decide something."""
        return self.results_of_this_step if self.judged else {}

    def after_step(self, window: Window) -> dict[str, Result] | None:
        """Evaluate the validation data if that is due, and return the results if they may decide something.

        None where it is not due, was cut short, or is due only because the run ends.
        """
        if not self._triggers.is_due(self._every, window) or not (self._validation or window.run_ends):
            return None
        judged = self._triggers.is_due_by_interval(self._every, window)
        results = self._validate(judged=judged)
        return results if judged else None

    def _validate(self, *, judged: bool) -> dict[str, Result] | None:
        """Evaluate, or note that the evaluation was cut short and is still to come."""
        results = self._evaluated(self._validation, judged=judged)
        self._progress.evaluation_due = results is None
        self._progress.evaluation_extra = results is None and not judged
        if results:
            self.results, self.judged, self._step = results, judged, self._progress.step
            self._report("validation", results)
        return results

    def judge(self, results: Mapping[str, Result]) -> None:
        """Let results count towards early stopping; they are equal on every rank."""
        if self._state.early_stopping is not None:
            self._state.early_stopping.after_evaluation(results, self._progress.step)

    def catch_up(self) -> bool:
        """Do what was cut short when the run was left; return whether it was done this time."""
        judged = not self._progress.evaluation_extra
        results = self._validate(judged=judged)
        if results is None:
            return False
        if judged:
            self._state.schedule.after_evaluation(results)
            self.judge(results)
        return True

    def test(self) -> bool:
        """Evaluate the test data, if there is any; return False if that was cut short. Its results are in no checkpoint."""
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
        self._give_sign_of_life()

        def before_round() -> bool:
            self._give_sign_of_life()
            return self._services.stop_requested()

        with evaluated_weights(self._state.optimizer), self._services.garbage.paused():
            return self._weights.evaluate(
                evaluator, self._progress, extra=not judged, last=self._triggers.over, stop_requested=before_round
            )

    def _statistics_go_on(self) -> None:
        self._give_sign_of_life()

    def _give_sign_of_life(self) -> None:
        self._services.times.enter("evaluate", self._progress.step)  # an evaluation may take long
