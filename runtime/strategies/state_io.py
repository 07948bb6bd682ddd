"""Protocol for reading and writing the state of model and optimizer, of which a rank may hold only a part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import nn

from runtime.state.local_weights import LocalWeights


class StateIO(Protocol):
    """Reads and writes the state of a prepared module and optimizer. Every rank must call each method, in the same order."""

    writers: int
    """Number of ranks that write a checkpoint: 1 (rank 0), or all, each its own ``Shard`` of every tensor."""
    held_whole: bool
    """Whether every rank holds all of the state. Otherwise reading and loading it are collective. Equal on all ranks."""

    def module_state(self, part: nn.Module) -> dict[str, Any]:
        """Return the state dict of the module or a submodule; each tensor whole, or this rank's ``Shard``."""
        ...

    def load_module_state(self, part: nn.Module, state: Mapping[str, Any]) -> None:
        """Load a whole state dict, whose tensors are ``StoredTensor``, into the module or a submodule.

        Raises:
            RuntimeError, KeyError, ValueError: the state does not fit.
        """
        ...

    def optimizer_state(self) -> dict[str, Any]:
        """Return the optimizer's state dict in torch's format (parameters numbered); tensors as in :meth:`module_state`."""
        ...

    def load_optimizer_state(self, state: Mapping[str, Any]) -> None:
        """Load a whole optimizer state saved by any strategy."""
        ...

    def weights(self) -> LocalWeights:
        """Return this rank's part of each parameter, for averaging or exchanging weights."""
        ...

    def scaler_state(self) -> Mapping[str, Any]:
        """Return the loss scale's state; empty without one."""
        ...

    def load_scaler_state(self, state: Mapping[str, Any]) -> None:
        """Load the loss scale's state."""
        ...
