"""Builds the evaluators of a run's splits, and the choice between raw and averaged weights."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Literal

from runtime.build.builder import Builder
from runtime.build.preparation import RunComponents
from runtime.data.samples import Samples
from runtime.data.streams import StreamSamples
from runtime.data.training_data import MappedData
from runtime.evaluation.batch_statistics import BatchStatistics
from runtime.evaluation.evaluator import Evaluator
from runtime.evaluation.metrics import MetricSet
from runtime.strategies import Strategy
from runtime.training.averaged_evaluation import AveragedEvaluation


def build_evaluator(
    builder: Builder,
    strategy: Strategy,
    name: Literal["validation", "test"],
    *,
    slots: int,
    closing: ExitStack | None = None,
) -> Evaluator | None:
    """Build the evaluator of one split, or None if there is no such data.

    Args:
        closing: keeps loader workers alive until it is closed, for repeated evaluation.
    """
    samples = builder.samples(name, batch_size=builder.evaluation_micro_size(slots))
    if samples is None:
        return None
    return evaluator_of(samples, builder, strategy, name, slots=slots, closing=closing)


def evaluator_of(
    samples: Samples | StreamSamples,
    builder: Builder,
    strategy: Strategy,
    name: str,
    *,
    slots: int,
    closing: ExitStack | None = None,
) -> Evaluator:
    """Build the evaluator of given samples; see :func:`build_evaluator`."""
    return Evaluator(
        name,
        samples,
        micro_size=builder.evaluation_micro_size(slots),
        strategy=strategy,
        metrics=MetricSet(builder.metrics(), strategy.device, ordered=builder.values.determinism == "exact"),
        make_loader=builder.loader(strategy.device, closing),
        seed=builder.values.seed,
    )


def build_averaged_evaluation(
    builder: Builder,
    prepared: RunComponents,
    strategy: Strategy,
    *,
    closing: ExitStack,
    enter: Callable[[], None],
    log: Callable[[str], None],
) -> AveragedEvaluation:
    """Build the choice between raw and averaged weights for evaluation.

    Args:
        closing: keeps loader workers of passes for BatchNorm statistics alive until it is closed.
        enter: called at each global batch of such a pass.
        log: called with a message when evaluation switches to the averaged weights.

    Raises:
        ConfigurationError: the average needs BatchNorm statistics that cannot be computed.
    """
    values, average, data, statistics = builder.values, prepared.state.averaging, prepared.data, None
    if isinstance(data, MappedData):
        statistics = BatchStatistics(
            data.samples,
            data.order,
            assignment=prepared.assignment,
            strategy=strategy,
            make_loader=builder.loader(strategy.device, closing),
            seed=values.seed,
            enter=enter,
        )
    elif average is not None and average.has_statistics:
        what = "swa cannot compute BatchNorm statistics over a stream; use ema, or a model without BatchNorm"
        raise builder.where.error(("averaging", "kind"), what)
    wanted = values.averaging is not None and values.averaging.evaluate
    may_end = values.limit.early_stopping is not None
    return AveragedEvaluation(average, wanted=wanted, may_end=may_end, statistics=statistics, log=log)
