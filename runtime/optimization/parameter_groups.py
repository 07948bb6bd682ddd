"""Which parameters the optimizer treats alike: ``optimizer.groups``, ``no_decay`` and ``layer_decay``.

They combine: a parameter belongs to the first of ``groups`` that matches it; its layer multiplies its group's rate; and
``no_decay`` takes the weight decay away, unless the group gives one of its own.
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
from runtime.optimization.patterns import described_misses, matches, near_miss, useless

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_NUMBER = "{i}"


@dataclass
class ParameterGroup:
    """Parameters that are treated alike.

    Args:
        number: place in ``optimizer.groups``; None for what no group matches.
        steps: how many layers lie above it, each of which multiplies the rate by ``layer_decay.factor``.
        decays: False where ``no_decay`` took the weight decay away.
        args: what differs from the optimizer's own arguments.
        names: of its parameters, in the module's order.
        parameters: themselves.
    """

    number: int | None
    steps: int
    decays: bool
    args: dict[str, Any]
    names: list[str] = field(default_factory=list)
    parameters: list[nn.Parameter] = field(default_factory=list)

    @property
    def label(self) -> str:
        """What it is called in tables."""
        own = "" if self.number is None else f"groups.{self.number}"
        layer = f"{self.steps} layer{'s' * (self.steps > 1)} down" if self.steps else ""
        return ", ".join(filter(None, [own, layer, "" if self.decays else "no decay"])) or "all others"


def parameter_groups(module: nn.Module, section: OptimizerSection, classes: Sequence[type]) -> list[ParameterGroup]:
    """Share the trainable parameters out.

    Args:
        module: a TrainingModule; names are matched without the leading ``model.``.
        classes: the optimizer class of each of ``section.groups``, and last that of the optimizer itself.

    Raises:
        ComponentError: a pattern matches nothing, or a key has no effect.
    """
    parameters = {n.removeprefix("model."): p for n, p in module.named_parameters() if p.requires_grad}
    for key, patterns in _patterns(section):
        unused = useless(patterns, parameters)
        if unused:
            misses = described_misses(unused, parameters)
            raise ComponentError(f"no trainable parameter matches {misses}", key)
    everything = [n.removeprefix("model.") for n, _ in module.named_parameters()]
    steps = _steps(section.layer_decay, everything) if section.layer_decay else {}
    undecayed = _undecayed(module, section.no_decay) if section.no_decay else set()
    found: dict[tuple[bool, int, int, bool], ParameterGroup] = {}
    for name, parameter in parameters.items():
        number = next((n for n, group in enumerate(section.groups) if matches(name, group.match)), None)
        args = _own_args(section, number)
        takes_decay = "weight_decay" in _signature(classes[-1 if number is None else number])
        decays = name not in undecayed or "weight_decay" in args or not takes_decay
        step = steps.get(name, 0)
        separate = number is not None and section.groups[number].target is not None
        place = len(section.groups) if number is None else number
        key_of = (separate, place, step, not decays)  # groups with an optimizer of their own come last
        if key_of not in found:
            found[key_of] = ParameterGroup(number, step, decays, args)
        found[key_of].names.append(name)
        found[key_of].parameters.append(parameter)
    made = [found[key] for key in sorted(found)]
    for group in made:
        _adjust(group, section, classes[-1 if group.number is None else group.number])
    if section.no_decay and all(group.decays for group in made):
        raise ComponentError("has no effect: no parameter that it means has a weight decay to lose", ("no_decay",))
    return made


def default_of(optimizer_class: type, section_args: Mapping[str, Any], name: str) -> Any:
    """Return the value that an optimizer takes for an argument, or None if it has no such."""
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
    """Write rate and decay into the group's arguments, where they are not the optimizer's own."""
    separate = group.number is not None and section.groups[group.number].target is not None
    above = group.args if separate else {**section.args, **group.args}
    if group.steps and section.layer_decay:
        rate = default_of(optimizer_class, above, "lr")
        if not isinstance(rate, int | float):
            raise ComponentError(f"{optimizer_class.__name__} has no lr that could be multiplied", ("layer_decay",))
        group.args["lr"] = rate * section.layer_decay.factor**group.steps
    if not group.decays:
        group.decays = not default_of(optimizer_class, above, "weight_decay")  # then it has none to lose
        group.args["weight_decay"] = 0.0


def _steps(section: LayerDecaySection, names: Sequence[str]) -> dict[str, int]:
    """Return how many layers lie above each name's own; names in no layer are above all."""
    layers: dict[str, tuple[int, int]] = {}
    for place, pattern in enumerate(section.layers):
        expression = re.compile(
            fnmatch.translate(pattern.replace(_NUMBER, "LAYERNUMBER")).replace("LAYERNUMBER", r"(\d+)")
        )
        found = {name: match for name in names if name not in layers and (match := expression.match(name))}
        if not found:
            hint = near_miss(pattern.replace(_NUMBER, "0"), names)
            raise ComponentError(f"no parameter matches {pattern!r}{hint}", ("layer_decay", "layers", str(place)))
        layers |= {name: (place, int(match[1]) if match.re.groups else 0) for name, match in found.items()}
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
