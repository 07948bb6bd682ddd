"""The weights as one rank holds them: whole, or its part of each. Weight averaging needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, nn

from runtime.state.shards import Shard, StoredTensor, whole


class LocalWeights(Protocol):
    """This rank's piece of each parameter; averages are kept in pieces of the same shapes.

    Callers read and write pieces elementwise and in place, under ``no_grad``.
    """

    def pieces(self) -> Mapping[str, Tensor]:
        """Return the pieces by parameter name; they share the parameters' memory."""
        ...

    def to_checkpoint(self, name: str, piece: Tensor) -> Tensor | Shard:
        """Convert a piece shaped like ``pieces()[name]`` for a checkpoint. Collective: same order of names on all ranks."""
        ...

    def from_checkpoint(self, name: str, stored: StoredTensor) -> Tensor:
        """Return the piece of a stored whole tensor that corresponds to ``pieces()[name]``."""
        ...

    def refresh(self) -> None:
        """Update copies derived from the pieces (half-precision, gathered); call after writing to pieces. Collective."""
        ...


class WholeWeights:
    """Weights of a module that every rank holds whole."""

    def __init__(self, module: nn.Module) -> None:
        # Parameters, not their current data: wrapping the module again may give them other memory.
        self._pieces = dict(module.named_parameters())

    def pieces(self) -> Mapping[str, Tensor]:
        """Return the parameters by name."""
        return self._pieces

    def to_checkpoint(self, name: str, piece: Tensor) -> Tensor | Shard:
        """Return the piece, which is the whole tensor."""
        return piece

    def from_checkpoint(self, name: str, stored: StoredTensor) -> Tensor:
        """Return the whole tensor."""
        return whole(stored)

    def refresh(self) -> None:
        """Do nothing: the pieces are the parameters."""
