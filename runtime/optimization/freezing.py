"""Freezing of parameters by epoch: ``model.freeze`` and ``model.unfreeze``.

The frozen parameters are a function of the epoch and the configuration, so checkpoints do not store them. From the start the
optimizer holds every parameter that is ever trained: one without a gradient is skipped and gets its state with its first
update, at its group's rate at that time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal

from torch import nn

from runtime.config.component import ComponentError
from runtime.objective import TrainingModule
from runtime.optimization.patterns import described_misses, matches, unmatched


class Freezing:
    """Freezes a module's parameters, and unfreezes them at the start of given epochs.

    Modules all of whose parameters are frozen are kept in evaluation mode: their BatchNorm statistics do not change and their
    dropout is off, as for a fixed feature extractor. A module without parameters follows the module that contains it.

    Args:
        module: names are matched without the leading ``model.``.
        freeze: patterns of frozen parameters; they match only parameters that require a gradient.
        unfreeze: epochs, from 1, and patterns of the parameters that are trained from their start. Where several match, the
            earliest applies.
        mode: ``train`` leaves frozen modules in training mode.

    Raises:
        ComponentError: a pattern matches no trainable or frozen parameter.
    """

    def __init__(
        self,
        module: TrainingModule,
        *,
        freeze: Sequence[str] = (),
        unfreeze: Sequence[tuple[int, Sequence[str]]] = (),
        mode: Literal["eval", "train"] = "eval",
    ) -> None:
        names = {n.removeprefix("model."): p for n, p in module.named_parameters() if p.requires_grad}
        _check(freeze, names, ("freeze",), "no trainable parameter matches")
        frozen = [name for name in names if matches(name, freeze)]
        for number, (_, patterns) in enumerate(unfreeze):
            _check(patterns, frozen, ("unfreeze", str(number), "match"), "no parameter frozen by model.freeze matches")
        self._module = module
        self._mode = mode
        self._frozen = frozenset(frozen)
        self._since = {
            name: min([epoch - 1 for epoch, patterns in unfreeze if matches(name, patterns)], default=math.inf)
            for name in frozen
        }
        self.epochs: Sequence[int] = sorted({int(epoch) for epoch in self._since.values() if epoch < math.inf})
        """Epochs, from 0, at whose start parameters are unfrozen."""

    def apply(self, epoch: int) -> bool:
        """Set which parameters require a gradient in this epoch, from 0; return whether anything changed.

        Gradients of parameters that become frozen must have been cleared.
        """
        changed = False
        for name, parameter in self._parameters().items():
            trained = epoch >= self._since[name]
            changed |= trained != parameter.requires_grad
            parameter.requires_grad_(trained)
        if self._mode == "eval":
            self._module.frozen = list(self._wholly_frozen(self._module.model))
            self._module.train(self._module.training)
        return changed

    def unfreeze_all(self) -> None:
        """Unfreeze every parameter that is ever trained, for building the optimizer and for checks of memory."""
        self.apply(self.epochs[-1] if self.epochs else 0)

    @property
    def trains_at_first(self) -> bool:
        """Whether there is a parameter to train before anything is unfrozen."""
        frozen = {id(p) for p in self._parameters().values()}
        return any(p.requires_grad and id(p) not in frozen for p in self._module.parameters())

    def trained_from(self, name: str) -> float:
        """Return the epoch, from 1, from whose start a parameter is trained; infinity if it stays frozen."""
        return self._since.get(name, 0) + 1

    def _parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that are ever frozen, looked up by name: preparing a module may replace its parameters."""
        named = ((name.removeprefix("model."), p) for name, p in self._module.named_parameters())
        return {name: parameter for name, parameter in named if name in self._frozen}

    def _wholly_frozen(self, module: nn.Module) -> Iterator[nn.Module]:
        parameters = list(module.parameters())
        freezable = {id(parameter) for parameter in self._parameters().values()}
        if not any(id(parameter) in freezable for parameter in parameters):
            return
        if not any(parameter.requires_grad for parameter in parameters):
            yield module
            return
        for child in module.children():
            yield from self._wholly_frozen(child)


def _check(
    patterns: Sequence[str], names: Sequence[str] | dict[str, nn.Parameter], path: tuple[str, ...], problem: str
) -> None:
    unused = unmatched(patterns, names)
    if unused:
        raise ComponentError(f"{problem} {described_misses(unused, names)}", path)
