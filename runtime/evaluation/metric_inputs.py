"""What a metric is fed: told by the names of its ``update``'s parameters, torchmetrics' and users' own alike.

Predictions are what the objective hands to metrics: probabilities where it is a classification (the reason is in
:class:`runtime.losses.by_name.BinaryLoss`). ``indexes`` or ``groups`` are the samples' ``data.fields.group``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from runtime.errors import EvaluationError
from runtime.objective import Objective

if TYPE_CHECKING:
    from torchmetrics import Metric

Role = Literal["predictions", "target", "group", "weight"]

_TARGETS = ("target", "targets", "y_true", "labels")
_BY_NAME: Mapping[str, Role] = {
    **dict.fromkeys(("indexes", "groups", "group"), "group"),
    **dict.fromkeys(("weight", "weights", "sample_weight"), "weight"),
}


@dataclass(frozen=True)
class Feed:
    """What one metric's ``update`` takes.

    Args:
        positional: predictions and target in its order, or one of them.
        named: parameters that are given by name.
        optional: those of ``named`` that may be left out.
        logarithms: class probabilities are wanted as logarithms, (1, targets, classes).
    """

    positional: tuple[Role, ...]
    named: Mapping[str, Role]
    optional: frozenset[str] = frozenset()
    logarithms: bool = False

    @property
    def needs_group(self) -> bool:
        """Tell whether it does not work without ``data.fields.group``."""
        return any(role == "group" and name not in self.optional for name, role in self.named.items())


def feed_of(metric: Metric) -> Feed:
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
    return _feed(type(innermost).update, name, logarithms=isinstance(innermost, Perplexity))


def parts_of(metric: Metric) -> list[Metric]:
    """Return the metric and those that it wraps."""
    from torchmetrics import Metric

    return [part for part in metric.modules() if isinstance(part, Metric)]


def _feed(update: Callable[..., Any], name: str, *, logarithms: bool) -> Feed:
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
    return Feed(places if several else places[: len(needed)], named, frozenset(optional & set(named)), logarithms)


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
        self.given = tuple(_full_precision(value) for value in objective.metric_inputs(output, batch))

    @property
    def empty(self) -> bool:
        """Tell whether every target is masked."""
        return any(isinstance(value, Tensor) and value.numel() == 0 for value in self.given)

    def arguments(self, feed: Feed) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of a metric's ``update``.

        Raises:
            EvaluationError: the batch has no such part, or one of a wrong shape.
        """
        if len(self.given) != 2:
            return self.given, {}
        predictions, target = self.given
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
        if groups.is_floating_point():
            raise EvaluationError(f"data.fields.group must hold whole numbers or names, not {groups.dtype}")
        return groups.long()
    digests = (blake2b(str(group).encode(), digest_size=8).digest() for group in groups)
    return torch.tensor([int.from_bytes(digest, "big", signed=True) for digest in digests], device=device)


def _full_precision(value: Any) -> Any:
    half = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if half else value
