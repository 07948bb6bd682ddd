"""From the configuration's objective to the built one: a class of Lockstep's or the user's, a loss of torch, or several."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from runtime.config import component
from runtime.config.component import ComponentError
from runtime.config.file import LoadedConfiguration
from runtime.config.learning import LossPart
from runtime.config.types import ComponentSection
from runtime.data.fields import Fields
from runtime.errors import ConfigurationError, ObjectiveError
from runtime.losses.by_name import refusal, torch_loss
from runtime.losses.weighted_sum import WeightedSum
from runtime.objective import Objective
from runtime.randomness import Purpose, derive, preserved_random_state, seed_everything

OBJECTIVES = ("runtime.losses.by_name", "runtime.losses.focal", "runtime.losses.pairwise", "torch.nn")
"""Where a loss's short name is looked up."""

_CPU = torch.device("cpu")


def build_objective(loaded: LoadedConfiguration) -> Objective:
    """Build the objective from an Objective class or one of torch's losses, under the run's seed."""
    with preserved_random_state(_CPU):
        seed_everything(derive(loaded.values.seed, Purpose.INITIALIZATION, 2), _CPU)
        return _objective(loaded)


def _objective(loaded: LoadedConfiguration) -> Objective:
    values = loaded.values
    fields = Fields(**values.data.fields.model_dump(), output=values.model.output)
    built: dict[str, Objective] = {}
    for key, section in losses_of(loaded):
        loss = _loss(loaded, key, section)
        loss.fields = fields
        weight_key: tuple[str, ...] = ("data", "fields", "weight")
        if isinstance(section, LossPart):
            own = {**section.fields.model_dump(), "output": section.output}
            loss.fields = replace(fields, **{name: part for name, part in own.items() if part is not None})
            weight_key = (*key, "fields", "weight") if section.fields.weight is not None else weight_key
        if loss.fields.weight is not None and not loss.reads_sample_weights:
            raise _wrong(
                loaded,
                weight_key,
                f"{section.target} does not read it; multiply by self.fields.weight_of(batch) in its forward and weight, and "
                "say reads_sample_weights = True",
            )
        built[key[-1]] = loss
    if not values.objective.losses:
        return built["objective"]
    total = WeightedSum(built, {name: part.weight for name, part in values.objective.losses.items()})
    total.fields = fields
    return total


def losses_of(loaded: LoadedConfiguration) -> Iterator[tuple[tuple[str, ...], ComponentSection]]:
    """Yield key and section of each loss that is configured."""
    section = loaded.values.objective
    if section.target is not None:
        yield ("objective",), ComponentSection(target=section.target, args=section.args)
    for name, part in section.losses.items():
        yield ("objective", "losses", name), part


def _loss(loaded: LoadedConfiguration, key: tuple[str, ...], section: ComponentSection) -> Objective:
    try:
        found = component.locate(section.target, namespaces=OBJECTIVES, code=loaded.code)
        if _is_foreign_loss(found):
            arguments = component.resolved(section.args, code=loaded.code)
            built: Any = component.call(torch_loss, section.target, found, arguments)
        else:
            built = component.build(section.target, section.args, namespaces=OBJECTIVES, code=loaded.code)
    except ComponentError as mistake:
        raise _wrong(loaded, (*key, *mistake.path), mistake.what) from mistake
    except ObjectiveError as error:
        raise _wrong(loaded, key, str(error)) from error
    if not isinstance(built, Objective):
        raise _wrong(loaded, (*key, "target"), f"is a {type(built).__name__}, not a runtime.objective.Objective")
    return built


def _is_foreign_loss(found: Any) -> bool:
    return inspect.isclass(found) and issubclass(found, nn.Module) and not issubclass(found, Objective)


def refused_loss(loaded: LoadedConfiguration, section: ComponentSection) -> Iterator[ComponentError]:
    """Yield why a loss of torch cannot be an objective, without building it."""
    try:
        found = component.locate(section.target, namespaces=OBJECTIVES, code=loaded.code)
    except ComponentError:
        return  # told already
    what = refusal(found, section.args) if _is_foreign_loss(found) else None
    if what is not None:
        yield ComponentError(what)


def _wrong(loaded: LoadedConfiguration, key: tuple[str, ...], what: str) -> ConfigurationError:
    return ConfigurationError([loaded.problem(key, what)])
