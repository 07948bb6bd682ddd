"""Checks made once, at the first start of a run, before its first step: each examines one part of the user's input.

A check raises on certain mistakes and warns, in one line, of possible ones. It changes no state: random state, buffers,
gradients, weights and optimizer are bitwise the same afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from runtime import environment
from runtime.build.builder import Builder
from runtime.build.preparation import RunComponents
from runtime.checks.data import check_sampler, check_samples_repeat
from runtime.checks.evaluation import check_evaluation
from runtime.checks.gradients import check_gradients
from runtime.checks.lone_samples import check_lone_samples
from runtime.checks.objective import check_additivity
from runtime.checks.settings import check_settings
from runtime.evaluation.evaluator import Evaluator
from runtime.strategies import Strategy


@dataclass(frozen=True)
class FirstStart:
    """A run that is built and prepared, and has made no step.

    Args:
        evaluators: by split.
        warn: called with one line, by any rank; rank 0 shows it.
    """

    builder: Builder
    strategy: Strategy
    prepared: RunComponents
    evaluators: Mapping[str, Evaluator]
    warn: Callable[[str], None]


def check_first_start(start: FirstStart) -> None:
    """Run all checks, unless ``checks: off``. Collective: every rank must call this.

    Raises:
        LockstepError: the first check that failed.
    """
    builder, strategy, prepared, warn = start.builder, start.strategy, start.prepared, start.warn
    values, where, size = builder.values, builder.where, builder.values.batch.global_size
    if values.checks == "off":
        return
    for text in check_settings(
        builder,
        strategy.unwrapped,
        prepared.state.optimizer,
        prepared.state.schedule,
        prepared.data,
        processes=environment.local_world_size(strategy.world_size),
    ):
        warn(text)
    samples_repeat = check_samples_repeat(strategy, prepared, warn)
    check_sampler(builder.sampler, strategy, prepared, warn)
    make_loader = builder.loader(strategy.device, few=True)  # with workers, this process opens no data
    check_lone_samples(values.data, strategy, prepared, make_loader, batch_size=size, where=where, warn=warn)
    check_gradients(strategy, prepared, make_loader, seed=values.seed, where=where, warn=warn)
    if samples_repeat:  # otherwise reading a sample twice cannot be compared
        check_additivity(
            values.objective,
            strategy,
            prepared,
            make_loader,
            batch_size=size,
            compiled=values.compile is not None,
            where=where,
            warn=warn,
        )
    check_evaluation(builder, strategy, prepared.data, start.evaluators, warn)
