"""Buffers that have not changed so far: masks, tables, caches, counters that begin late.

Most of them never change, so they cost no reduction and, in each slot, one look at torch's count of the writes to a tensor.
What writes past that count (``.data``, NumPy) is seen where the values are compared.
"""

from __future__ import annotations

import torch
from torch import Tensor

from runtime.state.module_buffers import BufferPlace
from runtime.training.buffer_values import base, change, same_bits, wide


class StillBuffer:
    """One such buffer.

    Args:
        place: where it is; something is there.

    Attributes:
        agreed: its value when all ranks last had the same.
        start: its value when the present step began.
        changes: the sum of its changes in this rank's real slots of the present step, in float64; None without any.
    """

    def __init__(self, place: BufferPlace) -> None:
        held = place.held
        assert held is not None
        self.place = place
        self.agreed = self.start = held.detach().clone()
        self.changes: Tensor | None = None
        self._note()

    @property
    def is_private(self) -> bool:
        """Whether it has changed on this rank since all ranks had the same."""
        return self.start is not self.agreed

    def begin_step(self, *, compare: bool) -> None:
        """Take in what changed it between two steps.

        Args:
            compare: also look for writes that torch has not counted.
        """
        self.changes = None
        held = self._written(compare=compare)
        if held is not None:
            self.start = held.detach().clone()

    def end_slot(self, *, filler: bool, compare: bool) -> None:
        """Note what a slot changed, and put the buffer back."""
        held = self._written(compare=compare)
        if held is None:
            return
        if not filler:
            changed = change(held, base(wide(self.start))).to(torch.float64)
            self.changes = changed if self.changes is None else self.changes + changed
        self.put(self.start)

    def put(self, value: Tensor) -> None:
        """Let the buffer hold a value."""
        self.place.put(value)
        self._note()

    def went(self) -> Tensor:
        """Return how far it came in the steps since all ranks had the same, the present one left out."""
        return change(self.start, base(wide(self.agreed))).to(torch.float64)

    def _written(self, *, compare: bool) -> Tensor | None:
        """Return the buffer if it holds something else than when the step began; of another shape, it is another buffer."""
        held = self.place.held
        if held is self._held and not compare and self._version == _version(self._held):
            return None
        self._note()
        same_kind = held is not None and held.shape == self.start.shape and held.dtype == self.start.dtype
        return held if held is not None and same_kind and not same_bits(held, self.start) else None

    def _note(self) -> None:
        self._held = self.place.held
        self._version = _version(self._held)


def _version(tensor: Tensor | None) -> int:
    return -1 if tensor is None or tensor.is_inference() else tensor._version
