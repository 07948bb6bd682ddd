"""Early stopping: a run ends once a result of its evaluations no longer improves.

Results are equal on every rank, so all ranks decide the same without communication; its state is stored in checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from runtime.config.sections import EarlyStoppingSection
from runtime.errors import EvaluationError
from runtime.evaluation.metrics import Result


class EarlyStopping:
    """Counts the evaluations since the best one.

    Args:
        section: the watched result, and the patience.

    Attributes:
        best: the best value so far.
        best_step: the step of its evaluation.
        waited: evaluations since then.
    """

    def __init__(self, section: EarlyStoppingSection) -> None:
        self._section = section
        self.best: float | None = None
        self.best_step = 0
        self.waited = 0

    def after_evaluation(self, results: Mapping[str, Result], step: int) -> None:
        """Update with the validation results of a step.

        Raises:
            EvaluationError: there is no such result, or it is not a number.
        """
        section = self._section
        value = results.get(section.metric)
        if not isinstance(value, float):
            numbers = ", ".join(name for name, other in results.items() if isinstance(other, float))
            what = "is not a single number" if value is not None else "is not a result of the evaluation"
            raise EvaluationError(f"limit.early_stopping.metric: {section.metric!r} {what}; choose from: {numbers}")
        if self._improves(value):
            self.best, self.best_step, self.waited = value, step, 0
        else:
            self.waited += 1

    @property
    def exhausted(self) -> bool:
        """Whether the run must end."""
        return self.waited >= self._section.patience

    @property
    def reason(self) -> str:
        """Why the run ends."""
        section = self._section
        by = f" by more than {section.min_delta:g}" if section.min_delta else ""
        best = (
            f"the best value is {self.best:.6g}, after step {self.best_step}"
            if self.best is not None
            else "it was never finite"
        )
        return f"{section.metric} has not improved{by} in {self.waited} evaluation{'s' * (self.waited > 1)}; {best}"

    def _improves(self, value: float) -> bool:
        if not math.isfinite(value):
            return False
        gain = (
            math.inf if self.best is None else value - self.best if self._section.mode == "max" else self.best - value
        )
        return gain > self._section.min_delta

    def state_dict(self) -> dict[str, Any]:
        """Return the counters, and the result that they belong to."""
        section = self._section
        return {
            "watches": [section.metric, section.mode],
            "best": self.best,
            "best_step": self.best_step,
            "waited": self.waited,
        }

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Load a state; reset if there is none, or if it belongs to another result."""
        if state is None or list(state["watches"]) != [self._section.metric, self._section.mode]:
            self.best, self.best_step, self.waited = None, 0, 0
        else:
            self.best, self.best_step, self.waited = state["best"], state["best_step"], state["waited"]
