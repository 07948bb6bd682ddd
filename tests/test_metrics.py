"""Each metric is scikit-learn's on the whole data, however it is shared out over ranks and cut into batches."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from scipy.spatial import KDTree
from sklearn import metrics as sk
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from runtime.build.builder import Builder
from runtime.config.file import load
from runtime.errors import ConfigurationError, EvaluationError
from runtime.evaluation.class_results import MOST_POINTS
from runtime.evaluation.metric_states import encoded
from runtime.evaluation.metrics import MetricSet
from runtime.losses.by_name import torch_loss
from tests.measured_metrics import CPU, MANY, SIZE, TASKS, data, load_task, measure, metric
from tests.observed import configuration
from tests.process_pool import ProcessPool

WORLD_SIZES = (1, 2, 3)
OF_THEIR_OWN = {("many", "roc"), ("many", "auroc_binned"), ("two", "roc"), ("two", "curve")}  # in tests below
COMPARED = [(task, name) for task, (_, names) in TASKS.items() for name in names if (task, name) not in OF_THEIR_OWN]


@pytest.fixture(scope="module")
def measured(pool: ProcessPool) -> dict[tuple[int, int], list[Any]]:
    found = {n: pool.run(measure, n, (SIZE, 2)) for n in WORLD_SIZES}
    return {(size, n): [of_rank[size] for of_rank in found[n]] for size in (SIZE, 2) for n in WORLD_SIZES}


def expected_for_classes() -> dict[str, Any]:
    output, batch = data("many", SIZE)
    p, y = output.softmax(-1).numpy(), batch["target"].numpy()
    best, each = p.argmax(-1), sk.multilabel_confusion_matrix(y, p.argmax(-1))
    bins = np.clip(np.ceil(p.max(-1) * 10) - 1, 0, 9)
    gaps = [abs((best == y)[bins == b].mean() - p.max(-1)[bins == b].mean()) * (bins == b).mean() for b in set(bins)]
    return {
        "accuracy": sk.accuracy_score(y, best),
        "top2": sk.top_k_accuracy_score(y, p, k=2, labels=range(5)),
        "balanced": sk.balanced_accuracy_score(y, best),
        "f1": sk.f1_score(y, best, average="macro"),
        "f1_weighted": sk.f1_score(y, best, average="weighted"),
        "f1_each": sk.f1_score(y, best, average=None),
        "fbeta": sk.fbeta_score(y, best, beta=2, average="macro"),
        "precision": sk.precision_score(y, best, average="macro"),
        "recall": sk.recall_score(y, best, average="macro"),
        "specificity": (each[:, 0, 0] / each[:, 0].sum(-1)).mean(),
        "jaccard": sk.jaccard_score(y, best, average="macro"),
        "auroc": sk.roc_auc_score(y, p, multi_class="ovr"),
        "average_precision": sk.average_precision_score(np.eye(5)[y], p, average="macro"),
        "confusion": sk.confusion_matrix(y, best),
        "shares": sk.confusion_matrix(y, best, normalize="true"),
        "kappa": sk.cohen_kappa_score(y, best),
        "kappa_quadratic": sk.cohen_kappa_score(y, best, weights="quadratic"),
        "mcc": sk.matthews_corrcoef(y, best),
        "calibration": sum(gaps),
        "wrapped": {f"wrapped/multiclassrecall_{i}": r for i, r in enumerate(sk.recall_score(y, best, average=None))},
    }


def expected_for_two() -> dict[str, Any]:
    output, batch = data("two", SIZE)
    p, y, group = output.sigmoid().numpy(), batch["target"].numpy(), batch["group"].numpy()
    best = p > 0.5
    bins = np.clip(np.ceil(p * 10) - 1, 0, 9)
    gaps = [abs(y[bins == b].mean() - p[bins == b].mean()) for b in set(bins)]
    queries = [(p[group == q], y[group == q]) for q in np.unique(group)]

    def over_queries(of_query: Callable[[np.ndarray], float]) -> float:
        """Mean of what a query's relevances, best first, give."""
        return float(np.mean([of_query(y[np.argsort(-p)]) for p, y in queries]))

    assert len(queries) == 60
    assert all(y.any() and len(y) > 1 for _, y in queries)
    return {
        "accuracy": sk.accuracy_score(y, best),
        "f1": sk.f1_score(y, best),
        "specificity": sk.recall_score(y, best, pos_label=0),
        "auroc": sk.roc_auc_score(y, p),
        "average_precision": sk.average_precision_score(y, p),
        "confusion": sk.confusion_matrix(y, best),
        "mcc": sk.matthews_corrcoef(y, best),
        "calibration": max(gaps),
        "mrr": over_queries(lambda y: 1 / (1 + np.argmax(y))),
        "map": np.mean([sk.label_ranking_average_precision_score([y], [p]) for p, y in queries]),
        "ndcg": np.mean([sk.ndcg_score([y], [p]) for p, y in queries]),
        "ndcg5": np.mean([sk.ndcg_score([y], [p], k=5) for p, y in queries]),
        "precision5": over_queries(lambda y: y[:5].sum() / 5),
        "recall5": over_queries(lambda y: y[:5].sum() / y.sum()),
        "hit2": over_queries(lambda y: float(y[:2].any())),
    }


def expected_for_labels() -> dict[str, Any]:
    output, batch = data("labels", SIZE)
    p, y = output.sigmoid().numpy(), batch["target"].numpy()
    return {
        "f1": sk.f1_score(y, p > 0.5, average="macro"),
        "auroc": sk.roc_auc_score(y, p, average="macro"),
        "ranking": sk.label_ranking_average_precision_score(y, p),
        "coverage": sk.coverage_error(y, p),
    }


def expected_for_value() -> dict[str, Any]:
    output, batch = data("value", SIZE)
    p, y = output.numpy(), batch["target"].numpy()
    return {
        "mae": sk.mean_absolute_error(y, p),
        "mse": sk.mean_squared_error(y, p),
        "rmse": sk.root_mean_squared_error(y, p),
        "msle": sk.mean_squared_log_error(y, p),
        "mape": sk.mean_absolute_percentage_error(y, p),
        "r2": sk.r2_score(y, p),
        "explained": sk.explained_variance_score(y, p),
        "pearson": scipy.stats.pearsonr(y, p).statistic,
        "spearman": scipy.stats.spearmanr(y, p).statistic,
        "mean": p.mean(),
        "largest": p.max(),
    }


def expected_for_tokens() -> dict[str, Any]:
    output, batch = data("tokens", SIZE)
    counted = batch["target"] != -100
    p, y = output[counted].softmax(-1).numpy(), batch["target"][counted].numpy()
    return {"perplexity": np.exp(sk.log_loss(y, p, labels=range(11))), "accuracy": sk.accuracy_score(y, p.argmax(-1))}


@cache
def expected(task: str) -> dict[str, Any]:
    return {
        "many": expected_for_classes,
        "two": expected_for_two,
        "labels": expected_for_labels,
        "value": expected_for_value,
        "tokens": expected_for_tokens,
    }[task]()


@pytest.mark.parametrize(("task", "name"), COMPARED, ids=[f"{task}-{name}" for task, name in COMPARED])
def test_a_metric_is_scikit_learns_on_1_2_and_3_processes(measured: Any, task: str, name: str) -> None:
    for world_size in WORLD_SIZES:
        for results in measured[SIZE, world_size]:
            truth, found = expected(task)[name], results[task]
            if isinstance(truth, dict):
                assert {key: found[key] for key in truth} == pytest.approx(truth, rel=2e-6), world_size
            else:
                assert np.asarray(found[name]) == pytest.approx(np.asarray(truth), rel=2e-6), world_size


@pytest.mark.parametrize("world_size", [2, 3])
def test_two_samples_give_the_values_of_one_process(measured: Any, world_size: int) -> None:
    (alone,) = measured[2, 1]
    for results in measured[2, world_size]:
        for task, of_task in alone.items():
            assert results[task].keys() == of_task.keys()
            for name, value in of_task.items():
                if name == "pearson":  # torchmetrics 1.9 merges ranks that have a single value each to NaN
                    continue
                assert _flat(results[task][name]) == pytest.approx(_flat(value), rel=1e-9, nan_ok=True), (task, name)


def assert_among(points: Any, of_truth: Any) -> None:
    """Each point of a curve is one of the true curve."""
    distances, _ = KDTree(np.transpose(of_truth)).query(np.transpose(points))
    assert distances.max() < 1e-6


def _flat(value: Any) -> list[float]:
    return [v for inner in value for v in _flat(inner)] if isinstance(value, list) else [value]


def test_curves_are_scikit_learns_and_the_same_on_every_number_of_processes(measured: Any) -> None:
    output, batch = data("two", SIZE)
    p, y = output.sigmoid().numpy(), batch["target"].numpy()
    for world_size in WORLD_SIZES:
        results = measured[SIZE, world_size][0]["two"]
        false_positives, true_positives, _ = results["roc"]
        assert 50 < len(false_positives) <= MOST_POINTS
        assert_among(results["roc"][:2], sk.roc_curve(y, p, drop_intermediate=False)[:2])
        assert np.trapezoid(true_positives, false_positives) == pytest.approx(sk.roc_auc_score(y, p), abs=2e-3)
        assert (false_positives[0], true_positives[-1]) == (0, 1)
        precision, _, thresholds = results["curve"]
        assert len(precision) == len(thresholds) + 1 <= MOST_POINTS
        assert_among(results["curve"][:2], sk.precision_recall_curve(y, p)[:2])
        assert measured[SIZE, world_size][0]["many"]["roc"] == measured[SIZE, 1][0]["many"]["roc"]
        binned = measured[SIZE, world_size][0]["many"]["auroc_binned"]
        assert binned == pytest.approx(expected("many")["auroc"], abs=2e-3)


@pytest.mark.single
@pytest.mark.parametrize("name", ["accuracy", "f1", "precision", "auroc", "kappa"])
def test_a_mean_over_batches_would_be_another_value(name: str) -> None:
    """What the tests above compare could not tell sums from means of means otherwise."""
    loaded = load_task("many", it=TASKS["many"][1][name])
    output, batch = data("many", SIZE)
    values = []
    for ids in (slice(start, start + 96) for start in range(0, SIZE, 96)):
        metrics = MetricSet(Builder(loaded).metrics(), CPU)
        metrics.update(Builder(loaded).objective(), output[ids], {k: v[ids] for k, v in batch.items()})
        values.append(metrics.compute()["it"])
    assert np.mean(values) != pytest.approx(expected("many")[name], rel=1e-3)


# Which metrics share a state


def groups_of(*names: str, task: str = "many") -> list[list[str]]:
    loaded = load_task(task, **{name: TASKS[task][1][name] for name in names})
    return MetricSet(Builder(loaded).metrics(), CPU)._groups


@pytest.mark.single
def test_metrics_of_one_state_are_updated_and_kept_once() -> None:
    assert groups_of("balanced", "f1", "fbeta", "precision", "recall", "specificity") == [
        ["balanced", "f1", "fbeta", "precision", "recall", "specificity"]
    ]
    assert groups_of("confusion", "shares", "kappa", "kappa_quadratic", "mcc", "jaccard") == [
        ["confusion", "shares", "kappa", "kappa_quadratic", "mcc", "jaccard"]
    ]
    assert groups_of("mrr", "map", "precision5", "recall5", "hit2", task="two") == [
        ["mrr", "map", "precision5", "recall5", "hit2"]
    ]
    assert groups_of("auroc", "auroc_binned", "accuracy", "balanced", "wrapped") == [
        ["auroc"], ["auroc_binned"], ["accuracy"], ["balanced"], ["wrapped"],
    ]  # fmt: skip


@pytest.mark.single
def test_states_that_are_equal_after_the_first_batch_only_are_not_shared() -> None:
    """torchmetrics' MetricCollection would take top-1 for top-2 accuracy from here on."""
    loaded = load_task("many", accuracy=TASKS["many"][1]["accuracy"], top2=TASKS["many"][1]["top2"])
    objective, metrics = Builder(loaded).objective(), MetricSet(Builder(loaded).metrics(), CPU)
    metrics.update(objective, torch.eye(5), {"inputs": None, "target": torch.arange(5)})
    metrics.update(objective, torch.eye(5).roll(1, 0) + torch.eye(5) / 2, {"inputs": None, "target": torch.arange(5)})
    assert metrics.compute() == {"accuracy": 0.5, "top2": 1.0}


@pytest.mark.single
def test_a_look_at_the_figures_changes_nothing_and_an_evaluation_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_task("many", accuracy=TASKS["many"][1]["accuracy"])
    objective, ranks = Builder(loaded).objective(), [MetricSet(Builder(loaded).metrics(), CPU) for _ in range(2)]
    monkeypatch.setattr("runtime.evaluation.metrics.gather_bytes", lambda *_: [encoded(rank._own()) for rank in ranks])
    right, wrong = torch.eye(5), torch.eye(5).roll(1, 0)

    def accuracy_after(output: torch.Tensor) -> Any:
        for rank in ranks:
            rank.update(objective, output, {"inputs": None, "target": torch.arange(5)})
        return ranks[0].compute()["accuracy"]

    assert accuracy_after(right) == 1.0
    assert accuracy_after(wrong) == 0.5  # of both batches; what was merged for the first look is not counted again
    for rank in ranks:
        rank.reset()
    assert accuracy_after(wrong) == 0.0


# What a metric is fed


class Probe:
    """A user's metric, made here so that torchmetrics is imported where it is used."""

    @staticmethod
    def make(update: Callable[..., None]) -> Any:
        from torchmetrics import Metric

        return type("Own", (Metric,), {"update": update, "compute": lambda self: torch.tensor(0.0)})()


@pytest.mark.single
def test_a_users_metric_is_fed_by_the_names_of_its_parameters() -> None:
    seen: dict[str, Any] = {}

    def swapped(self: Any, y_true: Any, y_pred: Any, weight: Any, groups: Any = None) -> None:
        seen.update(y_true=y_true, y_pred=y_pred, weight=weight, groups=groups)

    from runtime.data.fields import Fields

    loaded = load_task("tokens")
    objective = Builder(loaded).objective()
    objective.fields = Fields(inputs="x", target="y", weight="w", group="who")
    output, target = torch.randn(2, 3, 11), torch.tensor([[1, -100, 2], [-100, -100, 3]])
    batch = {"x": output, "y": target, "w": torch.tensor([0.5, 2.0]), "who": ["anna", "bert"]}
    MetricSet({"own": Probe.make(swapped)}, CPU).update(objective, output, batch)
    assert seen["y_true"].tolist() == [1, 2, 3]
    assert torch.allclose(seen["y_pred"], output.softmax(-1)[target != -100])
    assert seen["weight"].tolist() == [0.5, 0.5, 2.0]
    anna, again, bert = seen["groups"].tolist()
    assert anna == again != bert


@pytest.mark.single
def test_a_batch_without_any_counted_target_is_left_out() -> None:
    loaded = load_task("tokens")
    objective, metrics = Builder(loaded).objective(), MetricSet(Builder(loaded).metrics(), CPU)
    output = torch.randn(1, 2, 11)
    metrics.update(objective, output, {"inputs": None, "target": torch.full((1, 2), -100)})
    assert metrics.compute() == {}
    metrics.update(objective, output, {"inputs": None, "target": torch.tensor([[3, -100]])})
    assert metrics.compute()["perplexity"] == pytest.approx(1 / output.softmax(-1)[0, 0, 3].item(), rel=1e-5)


@pytest.mark.single
@pytest.mark.parametrize(
    ("metrics", "changes", "words"),
    [
        ({"m": "RetrievalMRR"}, {"data.fields.group": None}, "evaluation.metrics.m: RetrievalMRR .* data.fields.group"),
        ({"m": "KLDivergence"}, {}, r"evaluation.metrics.m.target: KLDivergence.update\(p, q\) must be"),
        ({"m": metric("RunningMean")}, {}, "RunningMean works on single updates"),
        ({"m": metric("Accuracy", **MANY)}, {"evaluation.class_names": ["a", "b"]}, "2 names, but the metrics have 5"),
        ({"m": "MeanSquaredError"}, {"evaluation.class_names": ["a", "b"]}, "2 names, but the metrics have no classes"),
    ],
)
def test_what_cannot_be_fed_is_said_before_the_run(metrics: Any, changes: dict[str, Any], words: str) -> None:
    config = configuration(
        "unused", data={"train": "tiny:points", "fields": {"group": "g"}}, evaluation={"metrics": metrics}
    )
    for key, value in changes.items():
        *sections, last = key.split(".")
        section = config
        for name in sections:
            section = section[name]
        section[last] = value
    with pytest.raises(ConfigurationError, match=words):
        Builder(load(config)).metrics()


@pytest.mark.single
def test_a_group_of_another_shape_is_named() -> None:
    loaded = load_task("two", mrr=metric("RetrievalMRR"))
    batch = {"inputs": None, "target": torch.ones(3), "group": torch.zeros(2)}
    metrics = MetricSet(Builder(loaded).metrics(), CPU)
    with pytest.raises(EvaluationError, match="integers or names"):
        metrics.update(Builder(loaded).objective(), torch.randn(3), batch)
    batch["group"] = torch.zeros(2, dtype=torch.long)
    with pytest.raises(EvaluationError, match=r"data.fields.group has the shape \(2,\), the target \(3,\)"):
        metrics.update(Builder(loaded).objective(), torch.randn(3), batch)


@pytest.mark.single
@pytest.mark.parametrize(
    ("objective", "shape"), [("MSELoss", (4, 2)), ("FocalLoss", (4, 2)), ("NextTokenLoss", (4, 2, 11))]
)
def test_the_group_of_a_sample_that_weighs_nothing_is_left_out_with_it(objective: str, shape: tuple[int, ...]) -> None:
    seen: list[Any] = []

    def update(self: Any, preds: Any, target: Any, indexes: Any) -> None:
        seen.append((target, indexes))

    fields = {"target": "y", "weight": "w", "group": "who"}
    config = configuration("unused", data={"train": "tiny:points", "fields": fields}, objective=objective)
    target = torch.tensor([[1, 0], [0, 1], [1, 1], [0, 0]])
    target = target.float() if objective == "MSELoss" else target
    batch = {"y": target, "w": torch.tensor([1.0, 0.0, 2.0, 1.0]), "who": torch.tensor([5, 6, 7, 8])}
    MetricSet({"own": Probe.make(update)}, CPU).update(Builder(load(config)).objective(), torch.zeros(shape), batch)
    ((targets, indexes),) = seen
    assert indexes.shape == targets.shape
    assert indexes.flatten().tolist() == [5, 5, 7, 7, 8, 8]
    assert targets.flatten().tolist() == target[[0, 2, 3]].flatten().tolist()


# Memory


@pytest.mark.single
def test_what_grows_with_the_data_is_told_with_what_bounds_it() -> None:
    metrics = MetricSet(Builder(load_task("many")).metrics(), CPU)
    assert metrics.growing == {
        "auroc": "thresholds",
        "average_precision": "thresholds",
        "calibration": None,
        "roc": "thresholds",
    }


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.numel = max(self.numel, made.numel())
        return made


@pytest.mark.single
def test_binned_curves_take_little_memory_under_deterministic_algorithms() -> None:
    """torchmetrics compares 16 x 5 x 100 values with 2,000 bins there."""
    loaded = load_task("many", binned=metric("AUROC", **MANY, thresholds=100))
    objective, metrics = Builder(loaded).objective(), MetricSet(Builder(loaded).metrics(), CPU)
    output, batch = data("many", 16)
    torch.use_deterministic_algorithms(True)
    try:
        with Largest() as largest:
            metrics.update(objective, output, batch)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert largest.numel <= 16 * 5 * 100


@pytest.mark.single
def test_ranked_queries_take_little_memory_under_deterministic_algorithms() -> None:
    """torchmetrics compares each of 6,000 rows with each of 300 queries there."""
    loaded = load_task("two", recall=metric("RetrievalRecall", top_k=3))
    metrics = MetricSet(Builder(loaded).metrics(), CPU)
    output = torch.rand(6000, generator=torch.Generator().manual_seed(0)).logit()
    group = torch.arange(300).repeat(20)
    target = torch.zeros(6000)
    best = [int(torch.where(group == query, output, -torch.inf).argmax()) for query in range(150)]
    target[best] = 1  # the others have nothing to find
    metrics.update(Builder(loaded).objective(), output, {"inputs": output, "target": target, "group": group})
    torch.use_deterministic_algorithms(True)
    try:
        with Largest() as largest:
            results = metrics.compute()
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert results["recall"] == pytest.approx(0.5)
    assert largest.numel <= 10 * 6000


@pytest.mark.single
@pytest.mark.parametrize("cut", [2000, 37])
def test_metrics_of_large_values_that_differ_little_are_exact_in_float32(cut: int) -> None:
    """Prices near 100,000, ten apart: their sums of squares need 15 digits, and float32 has 7."""
    draw = np.random.default_rng(0)
    y = (100_000 + 10 * draw.standard_normal(2000)).astype(np.float32)
    p = (y + draw.standard_normal(2000)).astype(np.float32)
    from torchmetrics import regression as of

    made = {
        "r2": of.R2Score(),
        "explained": of.ExplainedVariance(),
        "pearson": of.PearsonCorrCoef(),
        "mse": of.MeanSquaredError(),
    }
    metrics = MetricSet(made, CPU)
    objective = torch_loss(nn.MSELoss, {})
    for rows in np.split(np.arange(2000), range(cut, 2000, cut)):
        metrics.update(objective, torch.from_numpy(p[rows]), (None, torch.from_numpy(y[rows])))
    truth = {
        "r2": sk.r2_score(y.astype(float), p.astype(float)),
        "explained": sk.explained_variance_score(y.astype(float), p.astype(float)),
        "pearson": scipy.stats.pearsonr(y.astype(float), p.astype(float)).statistic,
        "mse": sk.mean_squared_error(y.astype(float), p.astype(float)),
    }
    assert metrics.compute() == {key: pytest.approx(value, rel=1e-7) for key, value in truth.items()}
