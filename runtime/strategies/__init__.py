"""Distributed training strategies behind one protocol.

The contract: gradients are *summed* over microbatches and over ranks, so a loss divided by the global batch's weight gives
the global batch's gradient whichever rank ran which slot. A strategy owns the process group, the wrapped module, autocast and
the loss scale; the training loop uses none of them directly.

A rank may hold only a part of the model and of the optimizer's state, so both are read and written through
:attr:`Strategy.state_io`. Code outside this folder does not depend on which strategy is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from runtime.distributed.slot_reduction import SlotReduction
from runtime.objective import Loss, TrainingModule, Weight
from runtime.strategies.state_io import StateIO
from runtime.strategies.unused_parameters import UnusedParameters
from runtime.strategies.update import Update


class Strategy(Protocol):
    """A distributed training strategy. Every rank must call each method, in the same order."""

    device: torch.device
    world_size: int
    rank: int

    @property
    def state_io(self) -> StateIO:
        """Reads and writes the state of module and optimizer."""
        ...

    @property
    def slot_reduction(self) -> SlotReduction:
        """Sums other tensors over the slots of a step; from :meth:`prepare` on."""
        ...

    @property
    def collective_forward(self) -> bool:
        """Whether a forward pass is a collective.

        If so, all ranks run equally many, in evaluation and prediction too; results of the surplus ones are ignored.
        """
        ...

    @property
    def unwrapped(self) -> TrainingModule:
        """The module without the strategy's wrapper."""
        ...

    # Before the first step

    def place(self, module: TrainingModule) -> TrainingModule:
        """Move a module built on the CPU to where :meth:`prepare` expects it, and return it."""
        ...

    def prepare(self, module: TrainingModule, optimizer: Optimizer, *, slots: int) -> None:
        """Wrap module and optimizer; the optimizer must not have been stepped. Collective.

        May replace the module's parameters by other objects with the same names; the optimizer stays the same object and
        holds the new ones.

        Args:
            slots: K, microbatches of a step over all ranks.
        """
        ...

    def prepare_evaluation(self, module: TrainingModule) -> None:
        """Prepare a placed module for forward passes without training. Collective."""
        ...

    def unused_parameters(self, batch: Any) -> UnusedParameters | None:
        """Run a batch forward and backward; return the parameters without a gradient. Collective.

        Returns None if all have one, or if the strategy is configured for missing ones. Leaves no gradient. Buffers and the
        random state may change.
        """
        ...

    def warm_up(self, filler: Any) -> None:
        """Run one filler forward and backward without side effects, to fix the summation order of later steps. Collective."""
        ...

    def rewrap(self) -> None:
        """Wrap the module again after the set of trainable parameters has changed; :meth:`warm_up` must follow. Collective."""
        ...

    # A step

    def microbatch(self, *, slot: int, last: bool) -> AbstractContextManager[None]:
        """Return a context for one forward and backward pass; gradients are reduced in a window's last one. Collective.

        Args:
            slot: number in the step; negative for a filler.
            last: whether it is the last one of this rank's window.
        """
        ...

    def forward(self, batch: Any, *, filler: bool) -> Loss:
        """Call the wrapped module with a batch on this rank's device."""
        ...

    def backward(self, loss: Tensor, *, weight: Weight) -> None:
        """Add the gradient of ``loss / weight`` to the sum over slots and ranks; with several losses, that of their sum."""
        ...

    def step(self, max_grad_norm: float | None, *, measure_norm: bool) -> Update:
        """Check, clip and apply the gradient, and clear it. Collective.

        Args:
            max_grad_norm: clip the gradient to this 2-norm; None does not clip.
            measure_norm: whether to measure the norm even if nothing is clipped; equal on all ranks.
        """
        ...

    def discard(self) -> None:
        """Clear the gradient without applying it."""
        ...

    # Passes outside training

    def autocast(self) -> AbstractContextManager[None]:
        """Return a context for a forward pass outside training."""
        ...

    def output(self, positional: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
        """Call the model without its objective. Collective if :attr:`collective_forward`."""
        ...

    def barrier(self) -> None:
        """Wait for all ranks. Collective."""
        ...

    def close(self) -> None:
        """Leave the process group."""
        ...
