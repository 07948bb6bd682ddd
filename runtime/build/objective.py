"""Builds the objective: an Objective of Lockstep's or the user's, a loss of torch, or a weighted sum of several."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from runtime.build.component import Component, call_mistakes
from runtime.config import component
from runtime.config.component import ComponentError
from runtime.config.learning import LossPartSection
from runtime.data.fields import Fields
from runtime.errors import ObjectiveError
from runtime.losses.by_name import refusal, torch_loss
from runtime.losses.weighted_sum import WeightedSum
from runtime.objective import Objective
from runtime.randomness import Purpose, derive, preserved_random_state, seed_everything

_CPU = torch.device("cpu")


def loss_mistakes(loss: Component) -> list[ComponentError]:
    """Check a loss's arguments, and whether a loss of torch can be an objective."""
    mistakes = call_mistakes(loss)
    try:
        located = loss.locate()
    except ComponentError:
        return mistakes
    what = refusal(located, loss.args) if _is_foreign_loss(located) else None
    return mistakes if what is None else [*mistakes, ComponentError(what)]


def build_objective(
    single: Component | None, losses: Mapping[str, Component], *, fields: Fields, seed: int
) -> Objective:
    """Build the objective under the run's seed.

    Args:
        single: ``objective`` itself, if it has a target.
        losses: otherwise, its losses by name.
        fields: which part of a batch is what; each of several losses may override it.
    """
    with preserved_random_state(_CPU):
        seed_everything(derive(seed, Purpose.INITIALIZATION, 2), _CPU)
        if single is not None:
            return _with_fields(single, fields)
        built = {name: _with_fields(loss, fields) for name, loss in losses.items()}
    total = WeightedSum(built, {name: loss.section.weight for name, loss in losses.items()})
    total.fields = fields
    return total


def _with_fields(bound: Component, fields: Fields) -> Objective:
    loss, section = _loss(bound), bound.section
    loss.fields = fields
    weight_key: tuple[str, ...] = ("data", "fields", "weight")
    if isinstance(section, LossPartSection):
        own = {**section.fields.model_dump(), "output": section.output}
        loss.fields = replace(fields, **{name: part for name, part in own.items() if part is not None})
        weight_key = (*bound.key, "fields", "weight") if section.fields.weight is not None else weight_key
    if loss.fields.weight is not None and not loss.reads_sample_weights:
        raise bound.where.error(
            weight_key,
            f"{bound.target} does not read it; multiply by self.fields.weight_of(batch) in its forward and weight, and "
            "set reads_sample_weights = True",
        )
    return loss


def _loss(bound: Component) -> Objective:
    try:
        with bound.errors_at_key():
            located = bound.locate()
            if not _is_foreign_loss(located):
                built: Any = bound.build()
            else:
                arguments = component.resolved(bound.args, code=bound.code)
                built = component.call(torch_loss, bound.target, located, arguments)
    except ObjectiveError as error:
        raise bound.error(str(error)) from error
    if not isinstance(built, Objective):
        raise bound.error(f"is a {type(built).__name__}, not a runtime.objective.Objective", "target")
    return built


def _is_foreign_loss(located: Any) -> bool:
    return inspect.isclass(located) and issubclass(located, nn.Module) and not issubclass(located, Objective)
