"""Check with one microbatch each that metrics, watched results and predictions fit the model and its data.

Mistakes would otherwise appear at the first evaluation, after hours.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from runtime.build.builder import Builder
from runtime.checks.traces import left_as_it_was
from runtime.config.learning import ScheduleSection
from runtime.config.locations import Locations
from runtime.config.sections import BestSection, EarlyStoppingSection, PredictionSection
from runtime.data.fields import Name
from runtime.data.loading import MakeLoader
from runtime.data.training_data import MappedData, TrainingData
from runtime.distributed.collectives import gather_bytes
from runtime.errors import (
    ConfigurationError,
    DataError,
    EvaluationError,
    ForwardError,
    LockstepError,
    MetricError,
    ObjectiveError,
)
from runtime.evaluation.evaluator import Evaluator, TrialBatch
from runtime.evaluation.metric_inputs import signature_of
from runtime.inference.columns import ColumnBuilder, model_arguments
from runtime.inference.request import columns_of_sample
from runtime.inference.sample_submission import header_of
from runtime.model_calls import is_out_of_memory
from runtime.objective import Objective, full_precision
from runtime.randomness import preserved_random_state
from runtime.strategies import Strategy
from runtime.strategies.placement import to_device

_KINDS = {kind.__name__: kind for kind in (DataError, ForwardError, ObjectiveError)}


class _Verdict(NamedTuple):
    """What one rank found: the wrong key and why, or the kind of another error; a warning; whether memory ran out."""

    key: tuple[str, ...] = ()
    what: str = ""
    remark: str = ""
    out_of_memory: bool = False
    kind: str = ""


def check_evaluation(
    builder: Builder,
    strategy: Strategy,
    data: TrainingData,
    evaluators: Mapping[str, Evaluator],
    warn: Callable[[str], None],
) -> None:
    """Run one microbatch of each split through loss and metrics, and one through prediction. Collective. Changes no state.

    Without evaluation, one sample of the training data is predicted, unless it is a stream.

    Raises:
        ConfigurationError: a metric does not accept the model's output, a watched result does not exist, or a column or label
            of the predictions does not fit.
    """
    values = builder.values
    make_loader = builder.loader(strategy.device, few=True)
    watched = _watched(values.checkpoint.best, values.limit.early_stopping, values.schedule)
    eager = torch.compiler.set_stance("force_eager")  # other shapes would trigger recompilation
    with (
        preserved_random_state(strategy.device),
        left_as_it_was(strategy.unwrapped, training=False),
        eager,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # caused by so few samples
        for number, (split, evaluator) in enumerate(evaluators.items()):
            tried, verdict = _tried(evaluator, make_loader)
            if tried is not None:
                verdict = _Verdict(remark=_soft_targets(builder, strategy.unwrapped.objective, tried))
            all_tried = _agree(verdict, strategy, builder.where, warn)
            if tried is None or not all_tried:
                continue
            problems = _of_results(watched, tried, values.evaluation.metrics, warn) if split == "validation" else []
            if problems:
                raise ConfigurationError([builder.where.problem(key, what) for key, what in problems])
            if number == 0:
                _agree(_of_prediction(builder, strategy, tried.batch), strategy, builder.where, warn)
        if not evaluators and values.prediction != PredictionSection() and isinstance(data, MappedData):
            batch = to_device(data.first_batch(1), strategy.device)
            _agree(_of_prediction(builder, strategy, batch), strategy, builder.where, warn)


def _tried(evaluator: Evaluator, make_loader: MakeLoader) -> tuple[TrialBatch | None, _Verdict]:
    try:
        return evaluator.try_first(make_loader), _Verdict()
    except MetricError as error:
        return None, _Verdict(("evaluation", "metrics", error.metric), str(error))
    except LockstepError as error:
        return None, _Verdict(what=str(error), kind=type(error).__name__)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None, _Verdict(out_of_memory=True)  # the first step reports what would fit


def _agree(verdict: _Verdict, strategy: Strategy, where: Locations, warn: Callable[[str], None]) -> bool:
    """Raise on all ranks what one of them found; return whether none ran out of memory. Collective."""
    replies = gather_bytes(json.dumps(verdict).encode(), strategy.device)
    verdicts = [_Verdict(*json.loads(reply)) for reply in replies]
    for other in verdicts:
        if other.kind:
            raise _KINDS.get(other.kind, EvaluationError)(other.what)
        if other.what:
            raise where.error(other.key, other.what)
    for text in list(dict.fromkeys(other.remark for other in verdicts if other.remark))[:1]:
        warn(text)
    return not any(other.out_of_memory for other in verdicts)


def _soft_targets(builder: Builder, objective: Objective, tried: TrialBatch) -> str:
    """Return a message on how metrics treat targets that are probabilities; empty if they are not."""
    if not tried.metrics or tried.batch is None:
        return ""
    target = objective.soft_target(tried.batch)
    between = target[(target > 0) & (target < 1)] if target is not None else None
    if between is None or not between.numel():
        return ""
    metrics = builder.metrics()
    values = [name for name, metric in metrics.items() if signature_of(metric).sees == "values"]
    classes = [name for name in metrics if name not in values]
    seen = [f"{', '.join(classes)} {'see' if classes[1:] else 'sees'} the likeliest class"] if classes else []
    seen += [f"{', '.join(values)} {'see' if values[1:] else 'sees'} the probabilities"] if values else []
    return f"evaluation.metrics: targets are probabilities (for example {float(between[0]):.3g}): {', '.join(seen)}"


def _watched(
    best: Sequence[BestSection], stopping: EarlyStoppingSection | None, schedule: ScheduleSection | None
) -> dict[tuple[str, ...], str]:
    """Return the names of the results that affect the run, by the key that names each."""
    watched: dict[tuple[str, ...], str] = {
        ("checkpoint", "best", str(n), "metric"): b.metric for n, b in enumerate(best)
    }
    if stopping is not None:
        watched["limit", "early_stopping", "metric"] = stopping.metric
    if schedule is not None and schedule.monitor is not None:
        watched["schedule", "monitor"] = schedule.monitor
    return watched


def _of_results(
    watched: Mapping[tuple[str, ...], str], tried: TrialBatch, metrics: Container[str], warn: Callable[[str], None]
) -> list[tuple[tuple[str, ...], str]]:
    """Return what is wrong with the names of watched results, with their keys. Collective.

    Args:
        metrics: names of the configured metrics.
    """
    try:
        results: dict[str, Any] = {**dict.fromkeys(tried.parts, 0.0), **tried.metrics.compute()}
    except EvaluationError as error:  # it may need more than one microbatch
        warn(f"evaluation.metrics: after one microbatch, {error}")
        return []
    return [(key, what) for key, name in watched.items() for what in _unfit(name, results, tried, metrics)]


def _unfit(name: str, results: Mapping[str, Any], tried: TrialBatch, metrics: Container[str]) -> Iterator[str]:
    base = name.partition("/")[0]
    silent = base in metrics and not any(r.partition("/")[0] == base for r in results)
    if silent or (not tried.parts and base not in metrics):
        return  # this microbatch has no counted samples
    numbers = ", ".join(result for result, value in results.items() if isinstance(value, float))
    if name not in results:
        yield f"no result is called {name!r}; the results of an evaluation are: {numbers}"
    elif not isinstance(results[name], float):
        yield f"{name!r} is not a single number; choose from: {numbers}"


def _of_prediction(builder: Builder, strategy: Strategy, batch: Any) -> _Verdict:
    """Predict a microbatch as configured in ``prediction``, if that is set. Collective if forward passes are."""
    values, objective = builder.values, strategy.unwrapped.objective
    section = values.prediction
    if section == PredictionSection() or batch is None:
        return _Verdict()
    try:
        positional, named = model_arguments(objective.fields, batch)
    except ObjectiveError:
        return _Verdict()  # the data to predict has other fields than the data to evaluate
    try:
        with torch.no_grad(), strategy.autocast():
            output = objective.fields.output_of(strategy.output(positional, named))
            predictions = objective.predicted(full_precision(output))
        size = len(next(iter(predictions.values())))
        names = values.evaluation.class_names or builder.sources.preparation["classes"] or ()
        requested = _columns(section, values.data.fields.id, builder.where)
        columns = ColumnBuilder(section, requested, builder.where.problem, names)
        columns.build(predictions, np.arange(size), np.arange(size), lambda name: np.arange(size))
    except ConfigurationError as error:
        (problem,) = error.problems
        return _Verdict(tuple(problem.key.split(".")), problem.what)
    except Exception as error:
        if is_out_of_memory(error):
            return _Verdict()
        return _Verdict(remark=f"prediction: a trial on one microbatch failed: {error}")
    return _Verdict()


def _columns(section: PredictionSection, id_field: Name | None, where: Locations) -> Mapping[str, str]:
    """Return the requested columns; from the sample submission, if that exists already."""
    sample = Path(section.sample_submission) if section.sample_submission else None
    if sample is None or section.columns or not sample.is_file():
        return section.columns
    header = header_of(sample)
    return columns_of_sample(section, Path("predictions.csv"), header, id_field=id_field, where=where)
