"""Every classification, regression and retrieval metric of torchmetrics gives what it gives for the whole data at once."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

import runtime.evaluation.metrics
from runtime.build.builder import Builder
from runtime.evaluation.metric_inputs import signature_of
from runtime.evaluation.metric_states import encoded
from runtime.evaluation.metrics import MetricSet
from tests.measured_metrics import CPU, data, load_task

SIZE = 101
GIVEN = {
    "num_classes": 5,
    "num_labels": 4,
    "min_precision": 0.4,
    "min_recall": 0.4,
    "min_sensitivity": 0.4,
    "min_specificity": 0.4,
    "beta": 2.0,
    "num_groups": 2,
    "p": 3.0,
    "threshold": 0.5,
}
# Each does not take (predictions, target) of its task; said by name so that new ones are noticed.
OTHER_INPUTS = {
    "BinaryFairness": "groups are numbered from 0",
    "BinaryGroupStatRates": "groups are numbered from 0",
    "MulticlassExactMatch": "more than one target for each sample",
    "ContinuousRankedProbabilityScore": "several predictions for each target",
    "CosineSimilarity": "vectors",
    "JensenShannonDivergence": "distributions p and q",
    "KLDivergence": "distributions p and q",
    "CriticalSuccessIndex": "takes a threshold, compared apart",
}
# Each is another value when the data is cut: its states cannot be merged exactly.
INEXACT: dict[str, str] = {}


def classes() -> Iterator[tuple[str, type[Any]]]:
    from torchmetrics import Metric, classification, regression, retrieval

    tasks = {"Binary": "two", "Multiclass": "many", "Multilabel": "labels"}
    for module, name in ((m, n) for m in (classification, regression, retrieval) for n in m.__all__):
        found = getattr(module, name)
        if inspect.isclass(found) and issubclass(found, Metric) and name not in OTHER_INPUTS:
            prefix = next((p for p in tasks if name.startswith(p)), None)
            if module is classification and prefix:
                yield tasks[prefix], found
            elif module is not classification:
                yield "two" if module is retrieval else "value", found


def made(found: type[Any]) -> Any:
    parameters = inspect.signature(found).parameters.items()
    needed = {key for key, p in parameters if p.default is p.empty or key in ("num_classes", "num_labels")}
    return found(**{key: GIVEN[key] for key in needed & set(GIVEN)})


def measured(found: type[Any], task: str, cuts: list[list[slice]], monkeypatch: pytest.MonkeyPatch) -> Any:
    """What ranks with these batches get."""
    objective, ranks = Builder(load_task(task)).objective(), [MetricSet({"it": made(found)}, CPU) for _ in cuts]
    output, batch = data(task, SIZE)
    for rank, batches in zip(ranks, cuts, strict=True):
        for ids in batches:
            rank.update(objective, output[ids], {key: value[ids] for key, value in batch.items()})
    payloads = [encoded(rank._own()) for rank in ranks]
    monkeypatch.setattr(runtime.evaluation.metrics, "gather_bytes", lambda *_: payloads)
    return {name: _flat(value) for name, value in ranks[-1].compute().items()}


def _flat(value: Any) -> list[float]:
    return [v for inner in value for v in _flat(inner)] if isinstance(value, list) else [value]


def test_no_metric_depends_on_how_the_data_is_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    cut = [[slice(0, 7), slice(7, 40)], [], [slice(40, 90), slice(90, 101)]]
    different, seen = {}, 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for task, found in classes():
            seen += 1
            signature_of(made(found))
            whole = measured(found, task, [[slice(0, SIZE)]], monkeypatch)
            shared = measured(found, task, cut, monkeypatch)
            assert whole, found
            same = whole.keys() == shared.keys() and all(
                shared[name] == pytest.approx(value, rel=1e-5, abs=1e-6, nan_ok=True) for name, value in whole.items()
            )
            if not same:
                different[found.__name__] = (whole, shared)
    assert seen > 90
    assert set(different) == set(INEXACT), different
