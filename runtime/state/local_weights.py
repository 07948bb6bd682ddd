"""The weights as one rank holds them: whole, or its part of each. What averages weights needs no more than that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, nn

from runtime.state.shards import Shard, StoredTensor, whole


class LocalWeights(Protocol):
    """What this rank holds of each parameter; averages are kept in the same pieces.

    The pieces are read and written elementwise and in place, under ``no_grad``.
    """

    def pieces(self) -> Mapping[str, Tensor]:
        """Return what is held, by parameter name; tensors that share the parameters' memory."""
        ...

    def to_checkpoint(self, name: str, piece: Tensor) -> Tensor | Shard:
        """Return a piece like ``pieces()[name]`` as a checkpoint takes it. Collective, in one order on all ranks."""
        ...

    def from_checkpoint(self, name: str, stored: StoredTensor) -> Tensor:
        """Return the piece of a whole tensor that belongs in the place of ``pieces()[name]``."""
        ...

    def written(self) -> None:
        """Called after pieces were written to: what is made of them is made anew."""
        ...


class WholeWeights:
    """Every rank holds all of every parameter."""

    def __init__(self, module: nn.Module) -> None:
        # The parameters, not what they hold now: wrapping the module anew may give them other memory.
        self._pieces = dict(module.named_parameters())

    def pieces(self) -> Mapping[str, Tensor]:
        """Return the parameters by name."""
        return self._pieces

    def to_checkpoint(self, name: str, piece: Tensor) -> Tensor | Shard:
        """Return the piece, which is the whole."""
        return piece

    def from_checkpoint(self, name: str, stored: StoredTensor) -> Tensor:
        """Return the whole."""
        return whole(stored)

    def written(self) -> None:
        """Do nothing: the pieces are the parameters."""
