"""The optimizer's parameter groups: ``optimizer.groups``, ``no_decay`` and ``layer_decay``.

They combine: a parameter belongs to the first of ``groups`` that matches it; its layer scales its group's rate; and
``no_decay`` sets its weight decay to 0, unless the group sets one.
"""

from __future__ import annotations

import fnmatch
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from runtime.config.component import ComponentError
from runtime.config.learning import LayerDecaySection, NoDecaySection, OptimizerSection
from runtime.optimization.patterns import described_misses, matches, near_miss, unmatched

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_NUMBER = "{i}"


@dataclass
class ParameterGroup:
    """Parameters with the same optimizer arguments.

    Args:
        number: index in ``optimizer.groups``; None for parameters that no group matches.
        steps: number of layers above it, each of which multiplies the rate by ``layer_decay.factor``.
        decays: False if ``no_decay`` removed the weight decay.
        args: arguments that differ from the optimizer's.
        names: of its parameters, in the module's order.
        parameters: in the same order.
    """

    number: int | None
    steps: int
    decays: bool
    args: dict[str, Any]
    names: list[str] = field(default_factory=list)
    parameters: list[nn.Parameter] = field(default_factory=list)

    @property
    def label(self) -> str:
        """Its name in tables."""
        own = "" if self.number is None else f"groups.{self.number}"
        layer = f"{self.steps} layer{'s' * (self.steps > 1)} down" if self.steps else ""
        return ", ".join(filter(None, [own, layer, "" if self.decays else "no decay"])) or "all others"


def parameter_groups(module: nn.Module, section: OptimizerSection, classes: Sequence[type]) -> list[ParameterGroup]:
    """Divide the trainable parameters into groups.

    Args:
        module: a TrainingModule; names are matched without the leading ``model.``.
        classes: the optimizer class of each of ``section.groups``, and last that of the optimizer itself.

    Raises:
        ComponentError: a pattern matches nothing, or a key has no effect.
    """
    parameters = {n.removeprefix("model."): p for n, p in module.named_parameters() if p.requires_grad}
    for key, patterns in _patterns(section):
        unused = unmatched(patterns, parameters)
        if unused:
            misses = described_misses(unused, parameters)
            raise ComponentError(f"no trainable parameter matches {misses}", key)
    names = [n.removeprefix("model.") for n, _ in module.named_parameters()]
    steps = _steps(section.layer_decay, names) if section.layer_decay else {}
    undecayed = _undecayed(module, section.no_decay) if section.no_decay else set()
    by_key: dict[tuple[bool, int, int, bool], ParameterGroup] = {}
    for name, parameter in parameters.items():
        number = next((n for n, group in enumerate(section.groups) if matches(name, group.match)), None)
        args = _own_args(section, number)
        has_decay = "weight_decay" in _signature(classes[-1 if number is None else number])
        decays = name not in undecayed or "weight_decay" in args or not has_decay
        step = steps.get(name, 0)
        separate = number is not None and section.groups[number].target is not None
        index = len(section.groups) if number is None else number
        group_key = (separate, index, step, not decays)  # groups with their own optimizer come last
        if group_key not in by_key:
            by_key[group_key] = ParameterGroup(number, step, decays, args)
        by_key[group_key].names.append(name)
        by_key[group_key].parameters.append(parameter)
    groups = [by_key[group_key] for group_key in sorted(by_key)]
    for group in groups:
        _adjust(group, section, classes[-1 if group.number is None else group.number])
    if section.no_decay and all(group.decays for group in groups):
        raise ComponentError("has no effect: none of the parameters that it selects has a weight decay", ("no_decay",))
    return groups


def default_of(optimizer_class: type, section_args: Mapping[str, Any], name: str) -> Any:
    """Return the optimizer's value of an argument: set or default; None if it has no such argument."""
    parameter = _signature(optimizer_class).get(name)
    if parameter is None or (parameter.default is parameter.empty and name not in section_args):
        return section_args.get(name)
    return section_args.get(name, parameter.default)


def _patterns(section: OptimizerSection) -> Iterator[tuple[tuple[str, ...], Sequence[str]]]:
    for number, group in enumerate(section.groups):
        yield ("groups", str(number), "match"), group.match
    if section.no_decay:
        yield ("no_decay",), section.no_decay.match


def _own_args(section: OptimizerSection, number: int | None) -> dict[str, Any]:
    return {} if number is None else dict(section.groups[number].args)


def _adjust(group: ParameterGroup, section: OptimizerSection, optimizer_class: type) -> None:
    """Write rate and weight decay into the group's arguments, where they differ from the optimizer's."""
    separate = group.number is not None and section.groups[group.number].target is not None
    args = group.args if separate else {**section.args, **group.args}
    if group.steps and section.layer_decay:
        rate = default_of(optimizer_class, args, "lr")
        if not isinstance(rate, int | float):
            raise ComponentError(f"{optimizer_class.__name__} has no lr to scale", ("layer_decay",))
        group.args["lr"] = rate * section.layer_decay.factor**group.steps
    if not group.decays:
        group.decays = not default_of(optimizer_class, args, "weight_decay")  # no_decay has no effect on a decay of 0
        group.args["weight_decay"] = 0.0


def _steps(section: LayerDecaySection, names: Sequence[str]) -> dict[str, int]:
    """Return the number of layers above each name's layer; names in no layer are above all."""
    layers: dict[str, tuple[int, int]] = {}
    for index, pattern in enumerate(section.layers):
        expression = re.compile(
            fnmatch.translate(pattern.replace(_NUMBER, "LAYERNUMBER")).replace("LAYERNUMBER", r"(\d+)")
        )
        matched = {name: match for name in names if name not in layers and (match := expression.match(name))}
        if not matched:
            hint = near_miss(pattern.replace(_NUMBER, "0"), names)
            raise ComponentError(f"no parameter matches {pattern!r}{hint}", ("layer_decay", "layers", str(index)))
        layers |= {name: (index, int(match[1]) if match.re.groups else 0) for name, match in matched.items()}
    order = sorted(set(layers.values()))
    others = any(name not in layers and not name.startswith("objective.") for name in names)
    top = len(order) if others else len(order) - 1
    return {name: top - order.index(layer) for name, layer in layers.items()}


def _undecayed(module: nn.Module, section: NoDecaySection) -> set[str]:
    kinds = (*(_NORMS if section.biases_and_norms else ()), *(_EMBEDDINGS if section.embeddings else ()))
    of_kind = {id(p) for part in module.modules() if isinstance(part, kinds) for p in part.parameters(recurse=False)}
    named = {full.removeprefix("model."): p for full, p in module.named_parameters()}
    return {
        name
        for name, p in named.items()
        if id(p) in of_kind or (section.biases_and_norms and p.ndim <= 1) or matches(name, section.match)
    }


def _signature(optimizer_class: type) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(optimizer_class).parameters
