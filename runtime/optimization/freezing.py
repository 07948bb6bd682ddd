"""Which parameters are trained in which epoch: ``model.freeze`` and ``model.unfreeze``.

What is frozen is a function of the epoch and the configuration, so no checkpoint says it. The optimizer holds every parameter
that is ever trained, from the start: one without a gradient is left alone and gets its state with its first update, at the
rate that its group then has.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal

from torch import nn

from runtime.config.component import ComponentError
from runtime.objective import TrainingModule
from runtime.optimization.patterns import described_misses, matches, useless


class Freezing:
    """Freezes a module's parameters, and unfreezes them at the start of given epochs.

    Modules all of whose parameters are frozen are kept in evaluation mode: their BatchNorm statistics stand still and their
    dropout is off, as for a fixed feature extractor. A module without parameters follows the one that contains it.

    Args:
        module: names are matched without the leading ``model.``.
        freeze: patterns of what is not trained; only of what the model itself lets be trained.
        unfreeze: epochs, counted from 1, and patterns of what is trained from their start on. Where several match, the
            earliest counts.
        mode: ``train`` leaves frozen modules in training mode.

    Raises:
        ComponentError: a pattern matches nothing that it could.
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
            _check(patterns, frozen, ("unfreeze", str(number), "match"), "nothing that model.freeze freezes matches")
        self._module = module
        self._mode = mode
        self._frozen = frozenset(frozen)
        self._since = {
            name: min([epoch - 1 for epoch, patterns in unfreeze if matches(name, patterns)], default=math.inf)
            for name in frozen
        }
        self.epochs: Sequence[int] = sorted({int(epoch) for epoch in self._since.values() if epoch < math.inf})
        """Epochs, counted from 0, at whose start something is unfrozen."""

    def apply(self, epoch: int) -> bool:
        """Make trainable what is in this epoch, counted from 0, and freeze the rest; return whether anything changed.

        Gradients of what is frozen must have been cleared.
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
        """Make trainable what is ever trained: what the optimizer holds, and what memory must suffice for."""
        self.apply(self.epochs[-1] if self.epochs else 0)

    @property
    def trains_at_first(self) -> bool:
        """Tell whether there is a parameter to train before anything is unfrozen."""
        frozen = {id(p) for p in self._parameters().values()}
        return any(p.requires_grad and id(p) not in frozen for p in self._module.parameters())

    def trained_from(self, name: str) -> float:
        """Return the epoch, counted from 1, from whose start on ``model.freeze`` lets a parameter be trained; or infinity."""
        return self._since.get(name, 0) + 1

    def _parameters(self) -> dict[str, nn.Parameter]:
        """Return what is ever frozen, by name: preparing a module may put other objects in the place of its parameters."""
        named = ((name.removeprefix("model."), p) for name, p in self._module.named_parameters())
        return {name: parameter for name, parameter in named if name in self._frozen}

    def _wholly_frozen(self, module: nn.Module) -> Iterator[nn.Module]:
        parameters = list(module.parameters())
        ours = {id(parameter) for parameter in self._parameters().values()}
        if not any(id(parameter) in ours for parameter in parameters):
            return
        if not any(parameter.requires_grad for parameter in parameters):
            yield module
            return
        for child in module.children():
            yield from self._wholly_frozen(child)


def _check(
    patterns: Sequence[str], names: Sequence[str] | dict[str, nn.Parameter], path: tuple[str, ...], what: str
) -> None:
    unused = useless(patterns, names)
    if unused:
        raise ComponentError(f"{what} {described_misses(unused, names)}", path)
