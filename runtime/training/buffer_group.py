"""Buffers of one type as one flat tensor, so that each slot costs a few operations however many buffers there are."""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_

import torch
from torch import Tensor

from runtime.state.module_buffers import BufferPlace, overlaps
from runtime.training.buffer_values import advanced, base, change, narrow, numbers, wide


class BufferGroup:
    """Buffers of one type that follow the rule.

    Args:
        places: where they are.
        likes: tensors of their shapes and type on ``meta``, which all ranks agree to reduce, whatever becomes of a buffer.

    Attributes:
        numbers: how many real numbers their change consists of.
        device: where they are.
    """

    def __init__(self, places: Sequence[BufferPlace], likes: Sequence[Tensor]) -> None:
        self._places, self._likes = places, likes
        self._sizes = [like.numel() for like in likes]
        self.numbers = sum(map(numbers, likes))
        self._held: list[Tensor] = []  # the buffers themselves, as long as all can be written to in place
        self._start_values: list[Tensor] = []
        self.device = next((held.device for place in places if (held := place.held) is not None), torch.device("cpu"))

    def begin_step(self) -> None:
        """Remember the buffers as they are."""
        self._look()
        self._start = self._flat()
        self._base = base(self._start)
        self._start_values = self._values(self._start)

    def end_slot(self, change_so_far: Tensor | None) -> None:
        """Add how far the buffers have come in a slot, and give them back the values that they had when the step began.

        Args:
            change_so_far: real numbers that are added to; None after a filler.
        """
        self._look()
        if change_so_far is not None:
            change_so_far += change(self._flat(), self._base)
        self._write(self._start_values)

    def advance(self, mean: Tensor, skipped: Tensor | None) -> None:
        """Advance by the mean change.

        Args:
            skipped: flag on the device: the buffers stay as they were where it is true.
        """
        values = advanced(self._start, mean)
        if skipped is not None:
            values = torch.where(skipped, self._start, values)
        self._write(self._values(values))

    def _look(self) -> None:
        """See whether the buffers still are tensors that can be written to in place; a forward pass may have replaced them."""
        held = [place.owner._buffers.get(place.key) for place in self._places]
        if self._held and all(map(is_, held, self._held)):
            return
        there = [tensor for tensor in held if tensor is not None]
        pairs = zip(there, self._likes, strict=False)
        usable = len(there) == len(held) and all(alike(*pair) and not overlaps(pair[0]) for pair in pairs)
        self._held = there if usable else []

    def _flat(self) -> Tensor:
        """Return all values one after another, in a type to count in; what is of another shape now counts as unchanged."""
        values = self._held
        if not values:
            starts = self._start_values or [torch.zeros_like(like, device=self.device) for like in self._likes]
            found = zip(self._places, self._likes, starts, strict=True)
            values = [held if (held := p.held) is not None and alike(held, like) else start for p, like, start in found]
        return torch.cat([wide(value.detach()).reshape(-1) for value in values])

    def _values(self, flat: Tensor) -> list[Tensor]:
        """Return a flat tensor's parts in the buffers' shapes and type."""
        values = narrow(flat, self._likes[0].dtype)
        return [part.view(like.shape) for part, like in zip(torch.split(values, self._sizes), self._likes, strict=True)]

    def _write(self, values: list[Tensor]) -> None:
        if self._held:
            torch._foreach_copy_(self._held, values)
            return
        for place, value in zip(self._places, values, strict=True):
            held = place.held
            if held is not None and alike(held, value):
                place.put(value)


def alike(first: Tensor, second: Tensor) -> bool:
    """Tell whether two tensors have the same shape and type."""
    return first.shape == second.shape and first.dtype == second.dtype
