"""The checks that a run makes once, at its first start, before its first step: each looks at one thing that users bring."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from runtime.checks.evaluation import check_evaluation
from runtime.checks.objective import check_additivity
from runtime.config.file import LoadedConfiguration
from runtime.evaluation.evaluator import Evaluator
from runtime.preparation import Prepared
from runtime.strategies import Strategy


@dataclass(frozen=True)
class FirstStart:
    """What the checks look at: a run whose parts are built and prepared, and which has not made a step.

    A check leaves no trace in any of it: random state, buffers, gradients, weights and optimizer are afterwards what they
    were, bit for bit.

    Args:
        warn: told what gives up a promise, in one line. Shown by rank 0; every rank may call it.
        evaluators: by the name of their split.
    """

    loaded: LoadedConfiguration
    strategy: Strategy
    prepared: Prepared
    warn: Callable[[str], None]
    evaluators: Mapping[str, Evaluator]


Check = Callable[[FirstStart], None]
"""Raises a LockstepError for what cannot be meant, warns of what might be. Collective: every rank calls it, in order."""

CHECKS: tuple[Check, ...] = (
    lambda start: check_additivity(start.loaded, start.strategy, start.prepared, start.warn),
    lambda start: check_evaluation(start.loaded, start.strategy, start.evaluators, start.warn),
)


def check_first_start(start: FirstStart) -> None:
    """Make all checks in turn, unless ``checks: off``. Collective: every rank must call this.

    Raises:
        LockstepError: what the first check that failed found.
    """
    if start.loaded.values.checks == "off":
        return
    for check in CHECKS:
        check(start)
