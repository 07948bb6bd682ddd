"""Buffers of one dtype as one flat tensor, so that each slot needs only a few operations for any number of buffers."""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_

import torch
from torch import Tensor

from runtime.state.module_buffers import BufferPlace, overlaps
from runtime.training.buffer_values import advanced, base, change, narrow, numbers, wide


class BufferGroup:
    """Buffers of one dtype that are averaged at every step.

    Args:
        places: where they are stored.
        likes: ``meta`` tensors with their shapes and dtype: all ranks reduce these shapes, even if a buffer is replaced.

    Attributes:
        numbers: how many real numbers their change has.
        device: their device.
    """

    def __init__(self, places: Sequence[BufferPlace], likes: Sequence[Tensor]) -> None:
        self._places, self._likes = places, likes
        self._sizes = [like.numel() for like in likes]
        self.numbers = sum(map(numbers, likes))
        self._held: list[Tensor] = []  # the buffers; empty unless all can be written in place
        self._start_values: list[Tensor] = []
        self.device = next((held.device for place in places if (held := place.held) is not None), torch.device("cpu"))

    def begin_step(self) -> None:
        """Save the buffers' values."""
        self._find_buffers()
        self._start = self._flat()
        self._base = base(self._start)
        self._start_values = self._values(self._start)

    def change(self) -> Tensor:
        """Return the buffers' change in a slot, flat."""
        self._find_buffers()
        return change(self._flat(), self._base)

    def restore(self) -> None:
        """Restore the buffers' values at the start of the step."""
        self._find_buffers()
        self._write(self._start_values)

    def advance(self, mean: Tensor, skipped: Tensor | None) -> None:
        """Advance by the mean change.

        Args:
            skipped: flag on the device: if true, the buffers keep their values.
        """
        values = advanced(self._start, mean)
        if skipped is not None:
            values = torch.where(skipped, self._start, values)
        self._write(self._values(values))

    def _find_buffers(self) -> None:
        """Check whether the buffers can still be written in place; a forward pass may have replaced them."""
        held = [place.owner._buffers.get(place.key) for place in self._places]
        if self._held and all(map(is_, held, self._held)):
            return
        present = [tensor for tensor in held if tensor is not None]
        pairs = zip(present, self._likes, strict=False)
        usable = len(present) == len(held) and all(alike(*pair) and not overlaps(pair[0]) for pair in pairs)
        self._held = present if usable else []

    def _flat(self) -> Tensor:
        """Return all values concatenated, in their wide dtype; a buffer whose shape has changed counts as unchanged."""
        values = self._held
        if not values:
            starts = self._start_values or [torch.zeros_like(like, device=self.device) for like in self._likes]
            rows = zip(self._places, self._likes, starts, strict=True)
            values = [held if (held := p.held) is not None and alike(held, like) else start for p, like, start in rows]
        return torch.cat([wide(value.detach()).reshape(-1) for value in values])

    def _values(self, flat: Tensor) -> list[Tensor]:
        """Split a flat tensor into the buffers' shapes and dtype."""
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
    """Whether two tensors have the same shape and dtype."""
    return first.shape == second.shape and first.dtype == second.dtype
