"""Builds torch's optimizer from ``optimizer`` in the configuration: its classes, groups and kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Muon, Optimizer

from runtime.config import component
from runtime.config.component import ComponentError
from runtime.config.learning import OptimizerSection
from runtime.config.signatures import class_name
from runtime.optimization.combined import CombinedOptimizer
from runtime.optimization.kernels import kernel_arguments
from runtime.optimization.parameter_groups import ParameterGroup, default_of, parameter_groups
from runtime.optimization.rehearsal import try_optimizer

NAMESPACES = ("torch.optim",)
EXCLUDED = {
    "LBFGS": "needs the loss evaluated several times per step; use torch.optim.Adam or SGD",
    "SparseAdam": "takes only sparse gradients, which are not reduced over processes; use Adam, with dense embeddings",
    "Optimizer": "is the base class of optimizers; use AdamW",
}
"""Classes of torch.optim that cannot be used, with the reason."""


def check_optimizer(section: OptimizerSection, code: Path) -> list[ComponentError]:
    """Look up the optimizer and its groups' optimizers, and compare arguments with signatures. Calls nothing."""
    mistakes = _check(section.target, section.args, code)
    if any(mistake.path == ("target",) for mistake in mistakes):
        return mistakes
    for number, group in enumerate(section.groups):
        key = ("groups", str(number))
        separate = group.target is not None
        args = group.args if separate else {**section.args, **group.args}
        mistakes += [
            ComponentError(mistake.what, key + mistake.path)
            for mistake in _check(group.target or section.target, args, code)
            if separate or mistake.path[-1] in group.args  # mistakes in the optimizer's arguments are reported above
        ]
    return mistakes


def default_rate(section: OptimizerSection, code: Path) -> str | None:
    """Describe the default rate of an optimizer whose ``lr`` was left out; None if it was set or has no default."""
    rate = default_of(component.locate(section.target, namespaces=NAMESPACES, code=code), section.args, "lr")
    if "lr" in section.args or rate is None:
        return None
    return f"{class_name(section.target)} with lr {rate:g}, its default (optimizer.args.lr is not set)"


def groups_of(section: OptimizerSection, module: nn.Module, code: Path) -> list[ParameterGroup]:
    """Divide the trainable parameters into the optimizer's groups.

    Raises:
        ComponentError: a pattern matches nothing, or a key has no effect.
    """
    return parameter_groups(module, section, [*_classes(section, code)])


def build(section: OptimizerSection, module: nn.Module, code: Path, *, elementwise: bool) -> Optimizer:
    """Build the optimizer over a TrainingModule's trainable parameters.

    Args:
        elementwise: see :func:`runtime.optimization.kernels.kernel_arguments`.

    Raises:
        ComponentError: see :func:`groups_of`; or the optimizer refuses its arguments.
    """
    groups = groups_of(section, module, code)
    classes = _classes(section, code)
    optimizers = []
    owners = [None, *(number for number, group in enumerate(section.groups) if group.target is not None)]
    for owner in owners:
        own = [group for group in groups if _owner(section, group) == owner]
        if not own and owner is None:
            raise ComponentError(
                f"no parameter is left for {section.target}: groups with their own target match all of them"
            )
        member = _member(section, owner, classes[-1 if owner is None else owner], own, code, elementwise=elementwise)
        optimizers.append(member)
    return optimizers[0] if len(optimizers) == 1 else CombinedOptimizer(optimizers)


def _member(
    section: OptimizerSection,
    owner: int | None,
    optimizer_class: type,
    groups: Sequence[ParameterGroup],
    code: Path,
    *,
    elementwise: bool,
) -> Optimizer:
    chosen = section if owner is None else section.groups[owner]
    target, path = chosen.target or section.target, () if owner is None else ("groups", str(owner))
    parameters = [parameter for group in groups for parameter in group.parameters]
    if optimizer_class is Muon:
        _refuse_for_muon(groups, path)
    param_groups = [_torch_group(group, {} if owner is None else chosen.args) for group in groups]
    try:
        extra = kernel_arguments(optimizer_class, chosen.args, parameters, elementwise=elementwise)
        optimizer = component.build(target, {**chosen.args, **extra}, param_groups, namespaces=NAMESPACES, code=code)
    except ComponentError as mistake:
        raise ComponentError(mistake.what, path + mistake.path) from mistake
    if not isinstance(optimizer, Optimizer):
        raise ComponentError(f"is a {type(optimizer).__name__}, not a torch.optim.Optimizer", (*path, "target"))
    try:
        try_optimizer(optimizer, target)
    except ComponentError as mistake:
        raise ComponentError(mistake.what, path + mistake.path) from mistake
    return optimizer


def _torch_group(group: ParameterGroup, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return torch's parameter group, with only the arguments that differ from its optimizer's."""
    args = {k: v for k, v in group.args.items() if k not in defaults or defaults[k] != v}
    return {"params": group.parameters, **args}


def _refuse_for_muon(groups: Sequence[ParameterGroup], path: tuple[str, ...]) -> None:
    named = [(name, p) for group in groups for name, p in zip(group.names, group.parameters, strict=True)]
    other = [name for name, parameter in named if parameter.ndim != 2]
    if other:
        listed = ", ".join(other[:8]) + (f" and {len(other) - 8} more" if len(other) > 8 else "")
        raise ComponentError(
            f"Muon takes matrices only, not {listed}: give these another optimizer, as in "
            'groups: [{match: ["*.bias"], target: AdamW, args: {lr: 3e-4}}] (embeddings and the head usually belong there too)',
            (*path, "target"),
        )


def _owner(section: OptimizerSection, group: ParameterGroup) -> int | None:
    return group.number if group.number is not None and section.groups[group.number].target is not None else None


def _classes(section: OptimizerSection, code: Path) -> list[type]:
    """Return the optimizer class of each group, and last that of the optimizer itself."""
    targets = [*(group.target or section.target for group in section.groups), section.target]
    return [component.locate(target, namespaces=NAMESPACES, code=code) for target in targets]


def _check(target: str, args: Mapping[str, Any], code: Path) -> list[ComponentError]:
    name = class_name(target)
    if name in EXCLUDED and (name == target or target.startswith("torch.optim")):
        return [ComponentError(f"{name} {EXCLUDED[name]}")]
    return component.check(target, args, namespaces=NAMESPACES, code=code, positional=1)
