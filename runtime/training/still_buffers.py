"""Buffers that have not changed so far: masks, tables, caches, counters that start late.

Most of them never change, so they need no reduction and, per slot, only one check of torch's version counter of the tensor.
Writes that bypass the counter (``.data``, NumPy) are detected when the values are compared.
"""

from __future__ import annotations

import torch
from torch import Tensor

from runtime.distributed.slot_tree import Node, RunningSum
from runtime.state.module_buffers import BufferPlace
from runtime.training.buffer_values import base, change, same_bits, wide


class StillBuffer:
    """One such buffer.

    Args:
        place: where it is stored; not empty.
        slots: of this rank.

    Attributes:
        agreed: its value when it was last equal on all ranks.
        start: its value at the start of the current step.
        changes: the sum of its changes in this rank's real slots of the current step, in float64.
        changed: whether there is any.
    """

    def __init__(self, place: BufferPlace, slots: range) -> None:
        held = place.held
        assert held is not None
        self.place = place
        self.agreed = self.start = held.detach().clone()
        self.changes = RunningSum[Tensor](slots, Tensor.add_)
        self.changed = False
        self._note()

    @property
    def is_private(self) -> bool:
        """Whether it has changed on this rank since it was last equal on all ranks."""
        return self.start is not self.agreed

    def begin_step(self, *, compare: bool) -> None:
        """Record changes made between two steps.

        Args:
            compare: also detect writes that bypass torch's version counter.
        """
        if self.changed:
            self.changes.take()
            self.changed = False
        held = self._written(compare=compare)
        if held is not None:
            self.start = held.detach().clone()

    def end_slot(self, slot: int, *, compare: bool) -> None:
        """Record a slot's change, and restore the buffer.

        Args:
            slot: number in the step; negative for a filler, whose change is dropped.
            compare: also detect writes that bypass torch's version counter.
        """
        held = self._written(compare=compare)
        if held is None:
            return
        if slot >= 0:
            self.changes.put(Node(0, slot), change(held, base(wide(self.start))).to(torch.float64))
            self.changed = True
        self.put(self.start)

    def put(self, value: Tensor) -> None:
        """Set the buffer's value."""
        self.place.put(value)
        self._note()

    def earlier_change(self) -> Tensor:
        """Return its change since it was last equal on all ranks, without the current step."""
        return change(self.start, base(wide(self.agreed))).to(torch.float64)

    def _written(self, *, compare: bool) -> Tensor | None:
        """Return the buffer if its value changed since the step began, else None, also if its shape or dtype changed."""
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
