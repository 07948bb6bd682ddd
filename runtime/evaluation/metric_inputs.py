"""What a metric is fed, by the names of its ``update``'s parameters: torchmetrics' and users' own alike.

Predictions are what the objective hands to metrics: probabilities where it is a classification (the reason is in
:class:`runtime.losses.by_name.BinaryLoss`). ``indexes`` or ``groups`` are the samples' ``data.fields.group``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from runtime.errors import EvaluationError
from runtime.objective import Objective, dtype_name, full_precision

if TYPE_CHECKING:
    from torchmetrics import Metric

Role = Literal["predictions", "target", "group", "weight"]

_TARGETS = ("target", "targets", "y_true", "labels")
_OF_CLASSES = ("classification", "clustering", "nominal", "segmentation")
_BY_NAME: Mapping[str, Role] = {
    **dict.fromkeys(("indexes", "groups", "group"), "group"),
    **dict.fromkeys(("weight", "weights", "sample_weight"), "weight"),
}


@dataclass(frozen=True)
class MetricSignature:
    """What one metric's ``update`` takes.

    Args:
        positional: predictions and target in its order, or one of them.
        named: parameters that are given by name.
        optional: those of ``named`` that may be left out.
        logarithms: class probabilities are wanted as logarithms, (1, targets, classes).
        sees: ``classes``: predictions of yes or no must be probabilities, targets are class numbers; ``values``: targets as
            they are in the batch, also where the loss takes them for probabilities of classes; ``own``: a user's update, which
            is given what the objective gives.
        probabilities: predictions are compared with a threshold or in bins, so they must be probabilities.
        float64: the metric subtracts sums of squares: in float32 the R2 of prices near 100,000 would be 1.0009, or 0.
    """

    positional: tuple[Role, ...]
    named: Mapping[str, Role]
    optional: frozenset[str] = frozenset()
    logarithms: bool = False
    sees: Literal["classes", "values", "own"] = "own"
    probabilities: bool = False
    float64: bool = False

    @property
    def needs_group(self) -> bool:
        """Tell whether it does not work without ``data.fields.group``."""
        return any(role == "group" and name not in self.optional for name, role in self.named.items())


def signature_of(metric: Metric) -> MetricSignature:
    """Return what a metric takes.

    Raises:
        EvaluationError: it cannot be fed, or its result would depend on how the data is cut up.
    """
    from torchmetrics.text import Perplexity
    from torchmetrics.wrappers import BootStrapper, Running

    name = type(metric).__name__
    if isinstance(metric, BootStrapper | Running):
        raise EvaluationError(f"{name} works on single updates, so its result would depend on how the data is cut up")
    innermost = parts_of(metric)[-1]
    feed = _feed(type(innermost).update, name, logarithms=isinstance(innermost, Perplexity))
    of_numbers = type(innermost).update.__module__.startswith("torchmetrics.regression.")
    return replace(feed, sees=_sees(innermost), probabilities=_wants_probabilities(innermost), float64=of_numbers)


def _sees(metric: Metric) -> Literal["classes", "values", "own"]:
    """Return what a metric looks at, by whose ``update`` it has and in which of torchmetrics' domains that is."""
    package, _, rest = type(metric).update.__module__.partition(".")
    if package != "torchmetrics":
        return "own"
    if rest.startswith("retrieval"):  # the gain of nDCG may be any number
        return "values" if getattr(metric, "allow_non_binary_target", False) else "classes"
    return "classes" if rest.partition(".")[0] in _OF_CLASSES or rest.startswith("text.perplexity") else "values"


def parts_of(metric: Metric) -> list[Metric]:
    """Return the metric and those that it wraps."""
    from torchmetrics import Metric

    return [part for part in metric.modules() if isinstance(part, Metric)]


def _feed(update: Callable[..., Any], name: str, *, logarithms: bool) -> MetricSignature:
    parameters = list(inspect.signature(update).parameters.values())[1:]
    named = {p.name: _BY_NAME[p.name] for p in parameters if p.name in _BY_NAME}
    of_any_kind = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    others = [p for p in parameters if p.name not in named and p.kind not in of_any_kind]
    needed = [p.name for p in others if p.default is p.empty]
    listed = ", ".join(p.name for p in parameters)
    if len(needed) > 2 or {"p", "q"} & set(needed):
        raise EvaluationError(
            f"{name}.update({listed}) is not (predictions, target), with a group by the name of 'indexes' or 'groups' and a "
            "weight by that of 'weight'; write a metric of your own around it"
        )
    places: tuple[Role, ...] = ("predictions", "target")
    if needed and needed[0] in _TARGETS:
        places = ("target", "predictions")
    several = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    optional = {p.name for p in parameters if p.default is not p.empty}
    return MetricSignature(
        places if several else places[: len(needed)], named, frozenset(optional & set(named)), logarithms
    )


def _wants_probabilities(metric: Metric) -> bool:
    """Tell whether torchmetrics would make probabilities of scores, batch by batch: those with one outside [0, 1]."""
    if not type(metric).update.__module__.startswith("torchmetrics.classification."):
        return False
    of_one_class = type(metric).__name__.startswith("Multiclass")  # it takes the largest score, whatever its scale
    return not of_one_class or hasattr(metric, "thresholds") or hasattr(metric, "n_bins")


class MetricInputs:
    """One microbatch as metrics see it.

    Args:
        objective: knows what is prediction, target and group.
        output: what the model returned.
        batch: what it was called with.

    Attributes:
        given: what the objective gives: predictions and target, or the arguments of every metric if they are not two.
    """

    def __init__(self, objective: Objective, output: Any, batch: Any) -> None:
        self._objective = objective
        self._batch = batch
        self.given = tuple(_plain(value) for value in objective.metric_inputs(full_precision(output), batch))

    @property
    def empty(self) -> bool:
        """Tell whether every target is masked."""
        return any(isinstance(value, Tensor) and value.numel() == 0 for value in self.given)

    def arguments(self, feed: MetricSignature) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of a metric's ``update``.

        Raises:
            EvaluationError: the batch has no such part, or one of a wrong shape.
        """
        if len(self.given) != 2:
            return self.given, {}
        predictions, target = self.given
        if feed.sees == "values":
            soft = self._objective.soft_target(self._batch)
            target = target if soft is None else _plain(soft)
        if feed.sees != "own":  # arithmetic, of which torch knows none with yes and no
            predictions, target = _counted(predictions), _counted(target)
        if feed.float64:
            predictions, target = _in_float64(predictions), _in_float64(target)
        if feed.probabilities and isinstance(predictions, Tensor) and predictions.is_floating_point():
            _check_probabilities(predictions)
        if feed.logarithms:
            predictions, target = predictions.log().unsqueeze(0), target.unsqueeze(0)
        known: dict[Role, Any] = {"predictions": predictions, "target": target}
        named = {name: self._of_samples(role) for name, role in feed.named.items()}
        present = {name: value for name, value in named.items() if value is not None}
        missing = set(named) - set(present) - feed.optional
        if missing:
            raise EvaluationError(f"it needs {', '.join(missing)}: say in data.fields which part of a batch that is")
        return tuple(known[role] for role in feed.positional), present

    def _of_samples(self, role: Role) -> Tensor | None:
        """Return what samples have each, for each target that metrics see."""
        fields, target = self._objective.fields, self.given[1]
        values = fields.group_of(self._batch) if role == "group" else fields.weight_of(self._batch)
        if values is None:
            return None
        if role == "group":
            values = _numbers(values, target.device)
        mask = self._objective.metric_mask(self._batch)
        shape = target.shape if mask is None else mask.shape
        found = _spread(values, shape, role)
        found = found if mask is None else found[mask]
        return found.reshape(target.shape) if found.numel() == target.numel() else _spread(found, target.shape, role)


def _spread(values: Tensor, shape: torch.Size, role: Role) -> Tensor:
    """Give each target of a sample what the sample has."""
    if values.shape == shape:
        return values
    if values.shape != shape[:1]:
        raise EvaluationError(
            f"data.fields.{role} has the shape {tuple(values.shape)}, the target {tuple(shape)}; it must be one for each "
            "sample, or of the target's shape"
        )
    return values.reshape(-1, *[1] * (len(shape) - 1)).expand(shape)


def _numbers(groups: Any, device: torch.device) -> Tensor:
    """Return groups as int64; names become numbers that are the same on every rank."""
    if isinstance(groups, Tensor):
        if groups.is_floating_point() or groups.is_complex():
            raise EvaluationError(f"data.fields.group must hold whole numbers or names, not {dtype_name(groups.dtype)}")
        return groups.long()
    digests = (blake2b(str(group).encode(), digest_size=8).digest() for group in groups)
    return torch.tensor([int.from_bytes(digest, "big", signed=True) for digest in digests], device=device)


def _check_probabilities(predictions: Tensor) -> None:
    """Refuse scores that are no probabilities.

    Raises:
        EvaluationError: one lies outside of [0, 1].
    """
    if bool(((predictions < 0) | (predictions > 1)).any()):
        raise EvaluationError(
            f"it takes probabilities, and predictions lie between {predictions.min():.3g} and {predictions.max():.3g}. "
            "torchmetrics would make probabilities of those microbatches that have one outside of 0 and 1, so the result would "
            "depend on how the data is cut: BCEWithLogitsLoss and CrossEntropyLoss give probabilities, and metric_inputs of "
            "an objective of your own can"
        )


def _plain(value: Any) -> Any:
    """Return a tensor in a type whose squares and sums are exact enough: at least float32, and int64."""
    if not isinstance(value, Tensor) or value.is_complex() or value.dtype == torch.bool:
        return value
    return full_precision(value) if value.is_floating_point() else value.long()


def _in_float64(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and not value.is_complex() else value


def _counted(value: Any) -> Any:
    return value.long() if isinstance(value, Tensor) and value.dtype == torch.bool else value
