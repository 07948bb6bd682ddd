"""Ways of sharing a model's training over processes, behind one protocol.

The contract: gradients are *summed* over microbatches and over ranks, so a loss divided by the global batch's weight gives
the global batch's gradient whichever rank ran which slot. A strategy owns the process group, the wrapped module, autocast and
the loss scale; the training loop knows none of them.

A rank may hold only a part of the model and of the optimizer's state, so both are read and written through
:attr:`Strategy.state_io`. Nothing outside this folder asks which strategy it has.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from runtime.objective import Loss, TrainingModule, Weight
from runtime.strategies.state_io import StateIO
from runtime.strategies.unused_parameters import UnusedParameters
from runtime.strategies.update import Update


class Strategy(Protocol):
    """One way of sharing the work. Every rank calls each method, in the same order."""

    device: torch.device
    world_size: int
    rank: int

    @property
    def state_io(self) -> StateIO:
        """What reads and writes the state of module and optimizer."""
        ...

    @property
    def collective_forward(self) -> bool:
        """Whether a forward pass of one rank needs one of every other rank.

        If so, all ranks run equally many, in evaluation and prediction too; surplus ones are not counted.
        """
        ...

    @property
    def unwrapped(self) -> TrainingModule:
        """The module as the user made it."""
        ...

    # Before the first step

    def place(self, module: TrainingModule) -> TrainingModule:
        """Return a module that was built on the CPU where :meth:`prepare` expects it."""
        ...

    def prepare(self, module: TrainingModule, optimizer: Optimizer) -> None:
        """Wrap module and optimizer, which has not been stepped. Collective.

        The module's parameters may be other objects afterwards, under the same names; the optimizer is the same object and
        holds them.
        """
        ...

    def prepare_evaluation(self, module: TrainingModule) -> None:
        """Take a placed module that is called and not trained. Collective."""
        ...

    def unused_parameters(self, batch: Any) -> UnusedParameters | None:
        """Run a batch forward and backward; return the parameters that got no gradient, unless that is allowed for.

        Leaves no gradient. Buffers and the random state may change. Collective.
        """
        ...

    def warm_up(self, filler: Any) -> None:
        """Run one filler through forward and backward, leaving no trace, so that later steps add in one order. Collective."""
        ...

    def rewrap(self) -> None:
        """Wrap the module again after the set of trainable parameters has changed; :meth:`warm_up` must follow. Collective."""
        ...

    # A step

    def microbatch(self, *, last: bool) -> AbstractContextManager[None]:
        """Surround one forward and backward pass; gradients are reduced in the last one of a window. Collective."""
        ...

    def forward(self, batch: Any, *, filler: bool) -> Loss:
        """Call the wrapped module with a batch on this rank's device."""
        ...

    def backward(self, loss: Tensor, *, weight: Weight) -> None:
        """Add the gradient of ``loss / weight`` to the sum over slots and ranks; of several losses, of their sum."""
        ...

    def step(self, max_grad_norm: float | None, *, measure_norm: bool) -> Update:
        """Check, clip and apply the gradient, and clear it.

        Args:
            max_grad_norm: the gradient is clipped to this 2-norm; None does not clip.
            measure_norm: whether to measure the norm though nothing is clipped; equal on all ranks.
        """
        ...

    def discard(self) -> None:
        """Clear the gradient without applying it."""
        ...

    # Passes outside training

    def autocast(self) -> AbstractContextManager[None]:
        """Surround a forward pass outside training."""
        ...

    def output(self, positional: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
        """Call the model alone, without its objective. Collective if :attr:`collective_forward`."""
        ...

    def barrier(self) -> None:
        """Wait for all ranks. Collective."""
        ...

    def close(self) -> None:
        """Leave the process group."""
        ...
