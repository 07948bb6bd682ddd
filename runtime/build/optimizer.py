"""Builds the optimizer and the freezing of parameters; errors name file, line and key."""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer

from runtime.build.component import Component
from runtime.config.component import ComponentError
from runtime.config.learning import ModelSection
from runtime.config.locations import Locations
from runtime.objective import TrainingModule
from runtime.optimization import optimizer as optimizer_building
from runtime.optimization.freezing import Freezing
from runtime.optimization.optimizer_eval_mode import switches
from runtime.optimization.parameter_groups import ParameterGroup


def optimizer_mistakes(optimizer: Component) -> list[ComponentError]:
    """Check the optimizer and its groups, which share its arguments."""
    return optimizer_building.check_optimizer(optimizer.section, optimizer.code)


def checked_with_optimizer(group: Component) -> list[ComponentError]:
    """Return nothing: a group's arguments are checked by :func:`optimizer_mistakes`."""
    return []


def build_optimizer(optimizer: Component, module: nn.Module, *, averages: bool, exact: bool) -> Optimizer:
    """Build the optimizer over a TrainingModule's trainable parameters.

    Args:
        averages: whether a running average of the weights is configured.
        exact: whether ``determinism`` is exact.
    """
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise optimizer.where.error(("model",), "has no trainable parameters")
    with optimizer.errors_at_key():
        built = optimizer_building.build(optimizer.section, module, optimizer.code, elementwise=exact)
    if switches(built) and averages:
        what = f"{type(built).__name__} averages the weights itself; leave 'averaging' out"
        raise optimizer.where.error(("averaging",), what)
    return built


def parameter_groups(optimizer: Component, module: nn.Module) -> list[ParameterGroup]:
    """Return the parameter groups of :func:`build_optimizer`, in the optimizer's order."""
    return optimizer_building.groups_of(optimizer.section, module, optimizer.code)


def group_names(optimizer: Component, module: nn.Module, built: Optimizer) -> tuple[str, ...]:
    """Name each parameter group as ``lockstep show`` does. Call while all parameters that are ever trained are trainable."""
    labels = [group.label for group in parameter_groups(optimizer, module)]
    if len(labels) != len(built.param_groups):  # a user's optimizer that regroups parameters
        labels = [f"group {number}" for number in range(len(built.param_groups))]
    return tuple(
        label if labels.count(label) == 1 else f"{label} {labels[: number + 1].count(label)}"
        for number, label in enumerate(labels)
    )


def build_freezing(section: ModelSection, module: TrainingModule, where: Locations) -> Freezing:
    """Build the freezing of parameters, without applying it."""
    stages = [(stage.epoch, stage.match) for stage in section.unfreeze]
    with where.errors_at("model"):
        freezing = Freezing(module, freeze=section.freeze, unfreeze=stages, mode=section.frozen_mode)
    if not freezing.trains_at_first:
        raise where.error(("model", "freeze"), "leaves no parameter to train in the first epoch")
    return freezing
