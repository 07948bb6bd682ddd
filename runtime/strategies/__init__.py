"""What differs between ways of sharing a model's work over processes, behind one protocol.

The contract: gradients are *summed* over microbatches and over ranks, so a loss divided by the global batch's weight gives
the global batch's gradient whoever ran which slot. A strategy owns the process group, the wrapped module, autocast and the
loss scale; the loop knows none of them.

All that touches the state of model and optimizer goes through the strategy, since a rank may hold only a part of it: what
is saved, what is loaded, what is averaged, how a model is called in evaluation. Nothing outside this folder asks which
strategy it has; :attr:`Strategy.sharded` and :attr:`Strategy.forwards_together` say what follows from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from runtime.objective import Loss, TrainingModule, Weight
from runtime.state.local_weights import LocalWeights


class Update(NamedTuple):
    """What became of a step's gradient; equal on all ranks.

    Args:
        skipped: whether parameters were left as they are; a flag on the device where the device decides by itself, and the
            host learns of it later.
        judged: whether it was the gradient that decided: it was not finite.
        grad_norm: 2-norm of the whole gradient before clipping, on the device; None where it was not measured.
    """

    skipped: bool | DeviceFlag
    judged: bool = False
    grad_norm: Tensor | None = None


class DeviceFlag:
    """A flag on the device, on its way to the host.

    The copy is queued behind what sets the flag. Read a step later, it has long arrived: only what was queued before the
    copy is waited for, not the forward and backward passes after it.
    """

    def __init__(self, flag: Tensor) -> None:
        self.on_device = flag
        self._copied: torch.cuda.Event | None = None
        if flag.device.type == "cuda":
            self._on_host = torch.empty_like(flag, device="cpu", pin_memory=True)
            self._on_host.copy_(flag, non_blocking=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()
        else:
            self._on_host = flag

    def __bool__(self) -> bool:
        """Return the flag. Waits for its copy."""
        if self._copied is not None:
            self._copied.synchronize()
        return bool(self._on_host.item())


class Strategy(Protocol):
    """One way of sharing the work. Every method is called on every rank, in the same order."""

    device: torch.device
    world_size: int
    rank: int

    @property
    def sharded(self) -> bool:
        """Tell whether the state is spread over the ranks: then all of them take part in collecting and in saving it."""
        ...

    @property
    def writes_together(self) -> bool:
        """Tell whether each rank writes a part of the state, as its ``Shard``; otherwise rank 0 writes all of it."""
        ...

    @property
    def forwards_together(self) -> bool:
        """Tell whether a forward pass of one rank needs one of every other.

        Then all run as many, in evaluation and prediction too; those to spare count nothing.
        """
        ...

    def place(self, module: TrainingModule) -> TrainingModule:
        """Return a module that was built on the CPU where :meth:`prepare` wants it."""
        ...

    def prepare(self, module: TrainingModule, optimizer: Optimizer) -> None:
        """Wrap module and optimizer, which has not been stepped. Collective.

        The module's parameters may be other objects afterwards, under the same names; the optimizer is the same object and
        holds them.
        """
        ...

    def prepare_evaluation(self, module: TrainingModule) -> None:
        """Take a module that was placed, and is called and not trained: nothing is reduced. Collective."""
        ...

    def rewrap(self) -> None:
        """Wrap the module anew, after what is trainable has changed; warm up again after it. Collective."""
        ...

    def warm_up(self, filler: Any) -> None:
        """Run one filler through forward and backward, leaving no trace, so that later steps add in one order. Collective."""
        ...

    def without_gradient(self, batch: Any) -> list[str]:
        """Run a batch forward and backward, and return the names of parameters that got no gradient; leave no gradient.

        Buffers and the random state may change. Collective.
        """
        ...

    def to_device(self, batch: Any) -> Any:
        """Move a batch's tensors to this rank's device."""
        ...

    def microbatch(self, *, last: bool) -> AbstractContextManager[None]:
        """Surround one forward and backward pass; gradients are reduced in the last one of a window. Collective."""
        ...

    def forward(self, batch: Any, *, filler: bool) -> Loss:
        """Call the wrapped module."""
        ...

    def backward(self, loss: Tensor, *, weight: Weight) -> None:
        """Add the gradient of ``loss / weight`` to the sum over slots and ranks; of several sums, of their sum."""
        ...

    def step(self, max_grad_norm: float | None, *, measure_norm: bool) -> Update:
        """Judge, clip and apply the gradient, and clear it.

        Args:
            max_grad_norm: longest gradient that is applied as it is; None: any.
            measure_norm: whether the norm is wanted though nothing is clipped; equal on all ranks.
        """
        ...

    def discard(self) -> None:
        """Clear the gradient unused."""
        ...

    @property
    def skips_overflow(self) -> bool:
        """Tell whether a non-finite gradient belongs to the search for a loss scale rather than being a failure."""
        ...

    @property
    def unwrapped(self) -> TrainingModule:
        """The module as the user made it."""
        ...

    def autocast(self) -> AbstractContextManager[None]:
        """Surround a forward pass outside training."""
        ...

    def output(self, positional: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
        """Call the model alone, without its objective. Collective where forward passes are."""
        ...

    def module_state(self, part: nn.Module) -> dict[str, Any]:
        """Return the state dict of the prepared module or a part of it, each tensor whole or as this rank's ``Shard``.

        Collective where sharded: in the same order on all ranks.
        """
        ...

    def load_module_state(self, part: nn.Module, state: Mapping[str, Any]) -> None:
        """Load a whole state dict, whose tensors are ``Stored``, into the prepared module or a part of it. Collective.

        Raises:
            RuntimeError, KeyError, ValueError: it does not fit.
        """
        ...

    def optimizer_state(self) -> dict[str, Any]:
        """Return the optimizer's state dict, as :meth:`module_state` does: in torch's form, parameters counted through."""
        ...

    def load_optimizer_state(self, state: Mapping[str, Any]) -> None:
        """Load a whole optimizer state, as :meth:`load_module_state` does, whichever strategy it was saved under."""
        ...

    def weights(self) -> LocalWeights:
        """Return what this rank holds of each parameter of the prepared module, for what averages or exchanges weights."""
        ...

    def state(self) -> Mapping[str, Any]:
        """Return what this strategy keeps besides module and optimizer (the loss scale)."""
        ...

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        ...

    def barrier(self) -> None:
        """Wait for all ranks. Collective."""
        ...

    def close(self) -> None:
        """Leave the process group."""
        ...
