"""Arguments of a metric's ``update``, by its parameters' names; for torchmetrics' metrics and users' own.

Predictions are what the objective passes to metrics: probabilities for a classification (the reason is in
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
_CLASSIFICATION = ("classification", "clustering", "nominal", "segmentation")
_BY_NAME: Mapping[str, Role] = {
    **dict.fromkeys(("indexes", "groups", "group"), "group"),
    **dict.fromkeys(("weight", "weights", "sample_weight"), "weight"),
}


@dataclass(frozen=True)
class MetricSignature:
    """Parameters of one metric's ``update``.

    Args:
        positional: predictions and target in its order, or one of them.
        named: keyword parameters.
        optional: those of ``named`` that may be left out.
        logarithms: class probabilities are passed as logarithms, (1, targets, classes).
        sees: ``classes``: binary predictions must be probabilities, targets are class indices; ``values``: targets as in the
            batch, even if the loss interprets them as class probabilities; ``own``: a user's update, which gets the
            objective's ``metric_inputs`` unchanged.
        probabilities: predictions are compared with a threshold or binned, so they must be probabilities.
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
        """Whether the metric requires ``data.fields.group``."""
        return any(role == "group" and name not in self.optional for name, role in self.named.items())


def signature_of(metric: Metric) -> MetricSignature:
    """Return the signature of a metric's ``update``.

    Raises:
        EvaluationError: its parameters are not supported, or its result would depend on how the data is batched.
    """
    from torchmetrics.text import Perplexity
    from torchmetrics.wrappers import BootStrapper, Running

    name = type(metric).__name__
    if isinstance(metric, BootStrapper | Running):
        raise EvaluationError(f"{name} works on single updates, so its result would depend on how the data is batched")
    innermost = parts_of(metric)[-1]
    signature = _signature(type(innermost).update, name, logarithms=isinstance(innermost, Perplexity))
    regression = type(innermost).update.__module__.startswith("torchmetrics.regression.")
    return replace(signature, sees=_sees(innermost), probabilities=_needs_probabilities(innermost), float64=regression)


def _sees(metric: Metric) -> Literal["classes", "values", "own"]:
    """Return ``MetricSignature.sees``, by the torchmetrics domain that defines the metric's ``update``."""
    package, _, rest = type(metric).update.__module__.partition(".")
    if package != "torchmetrics":
        return "own"
    if rest.startswith("retrieval"):  # the gain of nDCG may be any number
        return "values" if getattr(metric, "allow_non_binary_target", False) else "classes"
    return "classes" if rest.partition(".")[0] in _CLASSIFICATION or rest.startswith("text.perplexity") else "values"


def parts_of(metric: Metric) -> list[Metric]:
    """Return the metric and the metrics that it wraps, outermost first."""
    from torchmetrics import Metric

    return [part for part in metric.modules() if isinstance(part, Metric)]


def _signature(update: Callable[..., Any], name: str, *, logarithms: bool) -> MetricSignature:
    parameters = list(inspect.signature(update).parameters.values())[1:]
    named = {p.name: _BY_NAME[p.name] for p in parameters if p.name in _BY_NAME}
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    others = [p for p in parameters if p.name not in named and p.kind not in variadic]
    required = [p.name for p in others if p.default is p.empty]
    listed = ", ".join(p.name for p in parameters)
    if len(required) > 2 or {"p", "q"} & set(required):
        raise EvaluationError(
            f"{name}.update({listed}) must be (predictions, target), optionally with a group named 'indexes' or 'groups' and a "
            "weight named 'weight'; wrap it in a metric of your own"
        )
    roles: tuple[Role, ...] = ("predictions", "target")
    if required and required[0] in _TARGETS:
        roles = ("target", "predictions")
    several = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    optional = {p.name for p in parameters if p.default is not p.empty}
    return MetricSignature(
        roles if several else roles[: len(required)], named, frozenset(optional & set(named)), logarithms
    )


def _needs_probabilities(metric: Metric) -> bool:
    """Return whether torchmetrics would convert scores to probabilities only in batches with a score outside [0, 1]."""
    if not type(metric).update.__module__.startswith("torchmetrics.classification."):
        return False
    multiclass = type(metric).__name__.startswith("Multiclass")  # it takes the largest score, whatever its scale
    return not multiclass or hasattr(metric, "thresholds") or hasattr(metric, "n_bins")


class MetricInputs:
    """The metrics' view of one microbatch.

    Args:
        objective: defines predictions, target and group.
        output: the model's output.
        batch: the model's input.

    Attributes:
        values: the objective's ``metric_inputs``: predictions and target, or the arguments of every metric if they are not two.
    """

    def __init__(self, objective: Objective, output: Any, batch: Any) -> None:
        self._objective = objective
        self._batch = batch
        self.values = tuple(_plain(value) for value in objective.metric_inputs(full_precision(output), batch))

    @property
    def empty(self) -> bool:
        """Whether every target is masked."""
        return any(isinstance(value, Tensor) and value.numel() == 0 for value in self.values)

    def arguments(self, signature: MetricSignature) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of a metric's ``update``.

        Raises:
            EvaluationError: the batch lacks a part, or has one of a wrong shape.
        """
        if len(self.values) != 2:
            return self.values, {}
        predictions, target = self.values
        if signature.sees == "values":
            soft = self._objective.soft_target(self._batch)
            target = target if soft is None else _plain(soft)
        if signature.sees != "own":  # torch has no arithmetic on bool
            predictions, target = _bool_to_int(predictions), _bool_to_int(target)
        if signature.float64:
            predictions, target = _in_float64(predictions), _in_float64(target)
        if signature.probabilities and isinstance(predictions, Tensor) and predictions.is_floating_point():
            _check_probabilities(predictions)
        if signature.logarithms:
            predictions, target = predictions.log().unsqueeze(0), target.unsqueeze(0)
        by_role: dict[Role, Any] = {"predictions": predictions, "target": target}
        named = {name: self._per_target(role) for name, role in signature.named.items()}
        present = {name: value for name, value in named.items() if value is not None}
        missing = set(named) - set(present) - signature.optional
        if missing:
            raise EvaluationError(f"it needs {', '.join(missing)}: set in data.fields which part of a batch that is")
        return tuple(by_role[role] for role in signature.positional), present

    def _per_target(self, role: Role) -> Tensor | None:
        """Return the samples' groups or weights, one for each target that metrics see; None if there are none."""
        fields, target = self._objective.fields, self.values[1]
        values = fields.group_of(self._batch) if role == "group" else fields.weight_of(self._batch)
        if values is None:
            return None
        if role == "group":
            values = _group_numbers(values, target.device)
        mask = self._objective.metric_mask(self._batch)
        shape = target.shape if mask is None else mask.shape
        values = _expanded(values, shape, role)
        values = values if mask is None else values[mask]
        return (
            values.reshape(target.shape) if values.numel() == target.numel() else _expanded(values, target.shape, role)
        )


def _expanded(values: Tensor, shape: torch.Size, role: Role) -> Tensor:
    """Expand one value per sample to all targets of the sample."""
    if values.shape == shape:
        return values
    if values.shape != shape[:1]:
        raise EvaluationError(
            f"data.fields.{role} has the shape {tuple(values.shape)}, the target {tuple(shape)}; it must have "
            "one value per sample, or the target's shape"
        )
    return values.reshape(-1, *[1] * (len(shape) - 1)).expand(shape)


def _group_numbers(groups: Any, device: torch.device) -> Tensor:
    """Return groups as int64; names are hashed to numbers that are the same on every rank."""
    if isinstance(groups, Tensor):
        if groups.is_floating_point() or groups.is_complex():
            raise EvaluationError(f"data.fields.group must hold integers or names, not {dtype_name(groups.dtype)}")
        return groups.long()
    digests = (blake2b(str(group).encode(), digest_size=8).digest() for group in groups)
    return torch.tensor([int.from_bytes(digest, "big", signed=True) for digest in digests], device=device)


def _check_probabilities(predictions: Tensor) -> None:
    """Refuse scores that are not probabilities.

    Raises:
        EvaluationError: a score lies outside [0, 1].
    """
    if bool(((predictions < 0) | (predictions > 1)).any()):
        raise EvaluationError(
            f"it takes probabilities, but predictions lie between {predictions.min():.3g} and {predictions.max():.3g}. "
            "torchmetrics would convert only those microbatches to probabilities that have a score outside [0, 1], so the "
            "result would depend on how the data is batched: BCEWithLogitsLoss and CrossEntropyLoss give probabilities, and "
            "so can metric_inputs of a custom objective"
        )


def _plain(value: Any) -> Any:
    """Return a tensor in a dtype whose squares and sums are exact enough: at least float32, or int64."""
    if not isinstance(value, Tensor) or value.is_complex() or value.dtype == torch.bool:
        return value
    return full_precision(value) if value.is_floating_point() else value.long()


def _in_float64(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and not value.is_complex() else value


def _bool_to_int(value: Any) -> Any:
    return value.long() if isinstance(value, Tensor) and value.dtype == torch.bool else value
