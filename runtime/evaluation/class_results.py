"""Results that are not single numbers: values per class, confusion matrices and curves, classified by metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torchmetrics import Metric

Kind = Literal["per_class", "confusion", "label_confusions", "roc", "precision_recall"]

MOST_POINTS = 200
"""Most points of a reported curve. A longer one is reduced to its corners, and these to evenly spaced ones if too many."""


def kind_of(metric: Metric) -> Kind | None:
    """Return the kind of a metric's result, or None for a number or any other array.

    Decided by the class that defines its ``compute``: kappa and AUROC inherit from the confusion matrix and the curves.
    """
    from torchmetrics import classification as c

    kinds: dict[Kind, tuple[Any, ...]] = {
        "confusion": (c.BinaryConfusionMatrix, c.MulticlassConfusionMatrix),
        "label_confusions": (c.MultilabelConfusionMatrix,),
        "roc": (c.BinaryROC, c.MulticlassROC, c.MultilabelROC),
        "precision_recall": (
            c.BinaryPrecisionRecallCurve,
            c.MulticlassPrecisionRecallCurve,
            c.MultilabelPrecisionRecallCurve,
        ),
    }
    for kind, classes in kinds.items():
        if any(type(metric).compute is of_kind.compute for of_kind in classes):
            return kind
    several = getattr(metric, "num_classes", None) or getattr(metric, "num_labels", None)
    return "per_class" if several and getattr(metric, "average", "micro") in (None, "none") else None


def num_classes_of(metric: Metric) -> int | None:
    """Return the number of classes (or labels) of a metric's result, or None if it has no classes."""
    number = getattr(metric, "num_classes", None) or getattr(metric, "num_labels", None)
    return int(number) if number else 2 if kind_of(metric) is not None else None


def thinned(curve: Sequence[Any]) -> list[Any]:
    """Return a curve (two coordinates and thresholds, of one class or of each) with at most MOST_POINTS points."""
    first, second, thresholds = curve
    if isinstance(first, Tensor) and first.ndim == 1:
        return _thinned(first, second, thresholds)
    count = len(first)
    shared = isinstance(thresholds, Tensor) and thresholds.ndim == 1  # user-defined thresholds hold for all classes
    each = [_thinned(first[i], second[i], thresholds if shared else thresholds[i]) for i in range(count)]
    return [[parts[n] for parts in each] for n in range(3)]


def _thinned(first: Tensor, second: Tensor, thresholds: Tensor) -> list[list[float]]:
    if len(first) > MOST_POINTS:
        first, second, thresholds = _corners(first, second, thresholds)
    if len(first) > MOST_POINTS:
        steps = torch.hypot(first.diff().double(), second.diff().double()).nan_to_num()
        along = torch.cat([steps.new_zeros(1), steps.cumsum(0)])
        spaced = torch.linspace(0, float(along[-1]), MOST_POINTS, dtype=along.dtype, device=along.device)
        indices = torch.searchsorted(along, spaced).clamp(max=len(first) - 1)
        first, second, thresholds = _selected(torch.unique(indices), first, second, thresholds)
    return [first.tolist(), second.tolist(), thresholds.tolist()]


def _corners(*curve: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Remove points on a straight line between their neighbours."""
    turns = torch.stack([coordinate.diff(n=2).abs() > 1e-9 for coordinate in curve[:2]]).any(0)
    ends = turns.new_ones(1)
    return _selected(torch.cat([ends, turns, ends]).nonzero().flatten(), *curve)


def _selected(indices: Tensor, first: Tensor, second: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return first[indices], second[indices], thresholds[indices[indices < len(thresholds)]]


@dataclass(frozen=True)
class ClassResults:
    """Extracts tables, matrices and curves from the results of an evaluation.

    Args:
        kinds: metric name to the kind of its result.
        names: of the classes, from the configuration or the data; ignored for another number of classes.
    """

    kinds: Mapping[str, Kind]
    names: Sequence[str] | None = None

    @classmethod
    def of(cls, metrics: Mapping[str, Metric], names: Sequence[str] | None) -> Self:
        """Classify metrics."""
        kinds = {name: kind for name, metric in metrics.items() if (kind := kind_of(metric)) is not None}
        return cls(kinds, names)

    def class_names(self, size: int) -> list[str]:
        """Return the names of ``size`` classes; their indices if there are no matching names."""
        return list(self.names) if self.names and len(self.names) == size else [str(number) for number in range(size)]

    def table(self, results: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]] | None:
        """Return headings and a row for each class: name, number of targets if there is a confusion matrix, values."""
        columns = {name: values for name, values in self._of_kind("per_class", results) if _are_numbers(values)}
        if not columns:
            return None
        size = len(next(iter(columns.values())))
        columns = {name: values for name, values in columns.items() if len(values) == size}
        counts = [matrix for _, matrix in self.confusions(results) if len(matrix) == size]
        whole = [
            [int(sum(row)) for row in matrix] for matrix in counts if all(v == int(v) for row in matrix for v in row)
        ]
        if whole:
            columns = {"targets": whole[0], **columns}
        rows = [[name, *(values[i] for values in columns.values())] for i, name in enumerate(self.class_names(size))]
        return ["class", *columns], rows

    def confusions(self, results: Mapping[str, Any]) -> list[tuple[str, list[list[float]]]]:
        """Return the confusion matrices by metric: rows are true classes, columns predicted ones."""
        return self._of_kind("confusion", results)

    def label_confusions(self, results: Mapping[str, Any]) -> list[tuple[str, list[list[list[float]]]]]:
        """Return (labels, 2, 2) matrices by metric, absent then present: rows are true values, columns predicted ones."""
        return self._of_kind("label_confusions", results)

    def curves(self, results: Mapping[str, Any]) -> list[tuple[str, Kind, list[tuple[str, list[float], list[float]]]]]:
        """Return metric, kind and, for each class, its name and the x and y of its curve."""
        curves = []
        kinds: tuple[Kind, ...] = ("roc", "precision_recall")
        for kind in kinds:
            for name, (first, second, _) in self._of_kind(kind, results):
                several = bool(first) and isinstance(first[0], list)
                firsts, seconds = (first, second) if several else ([first], [second])
                x, y = (firsts, seconds) if kind == "roc" else (seconds, firsts)  # torchmetrics gives precision first
                labels = self.class_names(len(firsts)) if several else [""]
                curves.append((name, kind, list(zip(labels, x, y, strict=True))))
        return curves

    def _of_kind(self, kind: Kind, results: Mapping[str, Any]) -> list[tuple[str, Any]]:
        return [(name, results[name]) for name, of_kind in self.kinds.items() if of_kind == kind and name in results]


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, int | float) for value in values)
