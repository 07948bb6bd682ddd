"""Optimizer and what is frozen, from their sections; every mistake comes back with file, line and key."""

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
    """Return what is wrong with the optimizer and with its groups, which share its arguments."""
    return optimizer_building.check_optimizer(optimizer.section, optimizer.code)


def told_with_the_optimizer(group: Component) -> list[ComponentError]:
    """Return nothing: a group's arguments are checked by :func:`optimizer_mistakes`."""
    return []


def build_optimizer(optimizer: Component, module: nn.Module, *, averages: bool) -> Optimizer:
    """Build the optimizer over a TrainingModule's trainable parameters, fused where torch can.

    Args:
        averages: whether the configuration asks for a running average of the weights.
    """
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise optimizer.where.error(("model",), "has no trainable parameters")
    with optimizer.blamed():
        built = optimizer_building.build(optimizer.section, module, optimizer.code)
    if switches(built) and averages:
        what = f"{type(built).__name__} averages by itself; leave 'averaging' out"
        raise optimizer.where.error(("averaging",), what)
    return built


def parameter_groups(optimizer: Component, module: nn.Module) -> list[ParameterGroup]:
    """Return what :func:`build_optimizer` makes groups of, in the order of the optimizer's groups."""
    return optimizer_building.groups_of(optimizer.section, module, optimizer.code)


def group_names(optimizer: Component, module: nn.Module, built: Optimizer) -> tuple[str, ...]:
    """Name each of an optimizer's parameter groups, as ``lockstep show`` does; all that are ever trained must be trainable."""
    labels = [group.label for group in parameter_groups(optimizer, module)]
    if len(labels) != len(built.param_groups):  # an optimizer of the user's own that makes other groups
        labels = [f"group {number}" for number in range(len(built.param_groups))]
    return tuple(
        label if labels.count(label) == 1 else f"{label} {labels[: number + 1].count(label)}"
        for number, label in enumerate(labels)
    )


def build_freezing(section: ModelSection, module: TrainingModule, where: Locations) -> Freezing:
    """Build what freezes and unfreezes parameters; nothing is frozen by it yet."""
    stages = [(stage.epoch, stage.match) for stage in section.unfreeze]
    with where.blamed("model"):
        freezing = Freezing(module, freeze=section.freeze, unfreeze=stages, mode=section.frozen_mode)
    if not freezing.trains_at_first:
        raise where.error(("model", "freeze"), "leaves no parameter to train in the first epoch")
    return freezing
