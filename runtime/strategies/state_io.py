"""How the state of model and optimizer is read and written, of which a rank may hold only a part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import nn

from runtime.state.local_weights import LocalWeights


class StateIO(Protocol):
    """Reads and writes the state of a prepared module and its optimizer. Every rank calls each method, in the same order."""

    writers: int
    """Ranks that write a checkpoint: 1 (rank 0), or all of them, each its own ``Shard`` of every tensor."""
    held_whole: bool
    """Whether every rank holds all of the state, equal on all ranks. Otherwise collecting and loading are collective."""

    def module_state(self, part: nn.Module) -> dict[str, Any]:
        """Return the state dict of the module or a part of it; each tensor whole, or this rank's ``Shard``."""
        ...

    def load_module_state(self, part: nn.Module, state: Mapping[str, Any]) -> None:
        """Load a whole state dict, whose tensors are ``StoredTensor``, into the module or a part of it.

        Raises:
            RuntimeError, KeyError, ValueError: it does not fit.
        """
        ...

    def optimizer_state(self) -> dict[str, Any]:
        """Return the optimizer's state dict in torch's form, its parameters numbered; tensors as in :meth:`module_state`."""
        ...

    def load_optimizer_state(self, state: Mapping[str, Any]) -> None:
        """Load a whole optimizer state, whichever strategy saved it."""
        ...

    def weights(self) -> LocalWeights:
        """Return this rank's part of each parameter, for code that averages or exchanges weights."""
        ...

    def scaler_state(self) -> Mapping[str, Any]:
        """Return the loss scale's state; empty without one."""
        ...

    def load_scaler_state(self, state: Mapping[str, Any]) -> None:
        """Load the loss scale's state."""
        ...
