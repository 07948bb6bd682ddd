"""Whether metrics, results that something follows from, and predictions fit the model and its data: one microbatch each.

What does not fit would otherwise be found at the first evaluation, after hours.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from runtime.build import components, sources
from runtime.checks.objective import one_worker
from runtime.checks.traces import left_as_it_was
from runtime.config.file import LoadedConfiguration
from runtime.config.sections import Prediction
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
    Problem,
)
from runtime.evaluation.evaluator import Evaluator, Tried
from runtime.evaluation.metric_inputs import feed_of
from runtime.inference.columns import ColumnBuilder, model_arguments
from runtime.inference.request import columns_of_sample
from runtime.inference.sample_submission import header_of
from runtime.model_calls import is_out_of_memory
from runtime.objective import Objective, full_precision
from runtime.randomness import preserved_random_state
from runtime.strategies import Strategy

_KINDS = {kind.__name__: kind for kind in (DataError, ForwardError, ObjectiveError)}


class _Verdict(NamedTuple):
    """What one rank found: the key that is wrong and why, or the kind of another error; a remark; that there was no memory."""

    key: tuple[str, ...] = ()
    what: str = ""
    remark: str = ""
    out_of_memory: bool = False
    kind: str = ""


def check_evaluation(
    loaded: LoadedConfiguration,
    strategy: Strategy,
    data: TrainingData,
    evaluators: Mapping[str, Evaluator],
    warn: Callable[[str], None],
) -> None:
    """Run one microbatch of each split through loss and metrics, and one through prediction. Collective. Leaves no trace.

    Where nothing is evaluated, one sample of the training data is predicted; a stream's are left alone.

    Raises:
        ConfigurationError: a metric refuses what the model gives, a result that is judged does not exist, or a column or label
            of the predictions does not fit.
    """
    eager = torch.compiler.set_stance("force_eager")  # other shapes would be compiled anew
    with (
        preserved_random_state(strategy.device),
        left_as_it_was(strategy.unwrapped, training=False),
        eager,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # of so few samples
        for number, (split, evaluator) in enumerate(evaluators.items()):
            tried, verdict = _tried(loaded, strategy, evaluator)
            all_tried = _agree(loaded, strategy, verdict, warn)
            if tried is None or not all_tried:
                continue
            problems = _of_results(loaded, tried, warn) if split == "validation" else []
            if problems:
                raise ConfigurationError(problems)
            if number == 0:
                _agree(loaded, strategy, _of_prediction(loaded, strategy, tried.batch), warn)
        if not evaluators and loaded.values.prediction != Prediction() and isinstance(data, MappedData):
            batch = strategy.to_device(data.first_batch(1))
            _agree(loaded, strategy, _of_prediction(loaded, strategy, batch), warn)


def _tried(loaded: LoadedConfiguration, strategy: Strategy, evaluator: Evaluator) -> tuple[Tried | None, _Verdict]:
    make_loader = components.build_loader(one_worker(loaded), strategy.device)
    try:
        tried = evaluator.try_first(make_loader)
    except MetricError as error:
        return None, _Verdict(("evaluation", "metrics", error.metric), str(error))
    except LockstepError as error:
        return None, _Verdict(what=str(error), kind=type(error).__name__)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None, _Verdict(out_of_memory=True)  # the first step tells what would fit
    return tried, _Verdict(remark=_soft_targets(loaded, strategy.unwrapped.objective, tried))


def _agree(loaded: LoadedConfiguration, strategy: Strategy, verdict: _Verdict, warn: Callable[[str], None]) -> bool:
    """Raise on all ranks what one of them found; return whether all of them had the memory to try. Collective."""
    replies = gather_bytes(json.dumps(verdict).encode(), strategy.device)
    found = [_Verdict(*json.loads(reply)) for reply in replies]
    for other in found:
        if other.kind:
            raise _KINDS.get(other.kind, EvaluationError)(other.what)
        if other.what:
            raise ConfigurationError([loaded.problem(tuple(other.key), other.what)])
    for text in list(dict.fromkeys(other.remark for other in found if other.remark))[:1]:
        warn(text)
    return not any(other.out_of_memory for other in found)


def _soft_targets(loaded: LoadedConfiguration, objective: Objective, tried: Tried) -> str:
    """Return what metrics see of targets that are probabilities; empty where they are not."""
    if not tried.metrics or tried.batch is None:
        return ""
    target = objective.soft_target(tried.batch)
    between = target[(target > 0) & (target < 1)] if target is not None else None
    if between is None or not between.numel():
        return ""
    metrics = components.build_metrics(loaded)
    values = [name for name, metric in metrics.items() if feed_of(metric).sees == "values"]
    classes = [name for name in metrics if name not in values]
    seen = [f"{', '.join(classes)} {'see' if classes[1:] else 'sees'} the likeliest class"] if classes else []
    seen += [f"{', '.join(values)} {'see' if values[1:] else 'sees'} the probabilities"] if values else []
    return f"evaluation.metrics: targets are probabilities ({float(between[0]):.3g}, say): {', '.join(seen)}"


def _of_results(loaded: LoadedConfiguration, tried: Tried, warn: Callable[[str], None]) -> list[Problem]:
    """Return what is wrong with the names of results that are judged. Collective."""
    values = loaded.values
    try:
        results: dict[str, Any] = {**dict.fromkeys(tried.parts, 0.0), **tried.metrics.compute()}
    except EvaluationError as error:  # it may want more than one microbatch
        warn(f"evaluation.metrics: after one microbatch, {error}")
        return []
    judged: dict[tuple[str, ...], str] = {
        ("checkpoint", "best", str(n), "metric"): best.metric for n, best in enumerate(values.checkpoint.best)
    }
    if values.limit.early_stopping is not None:
        judged["limit", "early_stopping", "metric"] = values.limit.early_stopping.metric
    if values.schedule is not None and values.schedule.monitor is not None:
        judged["schedule", "monitor"] = values.schedule.monitor
    return [loaded.problem(key, what) for key, name in judged.items() for what in _unfit(loaded, name, results, tried)]


def _unfit(loaded: LoadedConfiguration, name: str, results: Mapping[str, Any], tried: Tried) -> Iterator[str]:
    base = name.partition("/")[0]
    silent = base in loaded.values.evaluation.metrics and not any(r.partition("/")[0] == base for r in results)
    if silent or (not tried.parts and base not in loaded.values.evaluation.metrics):
        return  # nothing of this microbatch counts
    numbers = ", ".join(result for result, value in results.items() if isinstance(value, float))
    if name not in results:
        yield f"no result is called {name!r}; an evaluation gives: {numbers}"
    elif not isinstance(results[name], float):
        yield f"{name!r} is not one number; these are: {numbers}"


def _of_prediction(loaded: LoadedConfiguration, strategy: Strategy, batch: Any) -> _Verdict:
    """Predict a microbatch as the section ``prediction`` says, where there is one. Collective where forward passes are."""
    section, objective = loaded.values.prediction, strategy.unwrapped.objective
    if section == Prediction() or batch is None:
        return _Verdict()
    try:
        positional, named = model_arguments(objective.fields, batch)
    except ObjectiveError:
        return _Verdict()  # what is predicted has other parts than what is evaluated
    try:
        with torch.no_grad(), strategy.autocast():
            output = objective.fields.output_of(strategy.output(positional, named))
            predictions = objective.predicted(full_precision(output))
        size = len(next(iter(predictions.values())))
        names = loaded.values.evaluation.class_names or sources.preparation(loaded)["classes"] or ()
        builder = ColumnBuilder(section, _wanted(loaded), loaded.problem, names)
        builder.build(predictions, np.arange(size), np.arange(size), lambda name: np.arange(size))
    except ConfigurationError as error:
        (problem,) = error.problems
        return _Verdict(tuple(problem.key.split(".")), problem.what)
    except Exception as error:
        if is_out_of_memory(error):
            return _Verdict()
        return _Verdict(remark=f"prediction: a first try failed: {error}")
    return _Verdict()


def _wanted(loaded: LoadedConfiguration) -> Mapping[str, str]:
    """Return the columns that are wanted; of a sample submission, where it is there already."""
    section = loaded.values.prediction
    sample = Path(section.sample_submission) if section.sample_submission else None
    if sample is None or section.columns or not sample.is_file():
        return section.columns
    return columns_of_sample(loaded, Path("predictions.csv"), header_of(sample))
