"""The rule that keeps buffers (BatchNorm statistics and the like) equal on all ranks and independent of their number.

Every slot starts from the buffers of the step's start. At the step's end they advance by the mean of the real slots'
changes, in one reduction; so the statistics depend on K alone, and fillers leave no trace. Counters, which every slot
advances alike, advance once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from runtime.strategies import DeviceFlag


class BufferRule:
    """Applies the rule around the slots of each step.

    Persistent numeric buffers follow it. A buffer that is not saved cannot be part of a run's state and is left alone;
    boolean and complex ones are constants (masks, rotary frequencies).

    Args:
        module: the bare TrainingModule.
        sum_over_ranks: reduces a tensor on the module's device in place. Collective.
    """

    def __init__(self, module: nn.Module, sum_over_ranks: Callable[[Tensor], object]) -> None:
        self._places = [
            (owner, name)
            for owner in module.modules()
            for name, buffer in owner._buffers.items()
            if buffer is not None and buffer.numel() and name not in owner._non_persistent_buffers_set
            if not (buffer.dtype == torch.bool or buffer.is_complex())
        ]
        self._sum_over_ranks = sum_over_ranks
        doubles = any(buffer.dtype == torch.float64 for buffer in self._buffers())
        self._dtype = torch.float64 if doubles else torch.float32  # of the reduced changes, counters included
        self._start: list[Tensor] = []
        self._change = torch.zeros(())

    def begin_step(self) -> None:
        """Remember the buffers as they are."""
        if not self._places:
            return
        self._start = [buffer.detach().clone() for buffer in self._buffers()]
        size = sum(start.numel() for start in self._start)
        self._change = torch.zeros(size, dtype=self._dtype, device=self._start[0].device)

    def end_slot(self, *, filler: bool) -> None:
        """Note what a slot changed, and put the buffers back."""
        if not self._places:
            return
        with torch.no_grad():
            if not filler:
                changes = zip(self._buffers(), self._start, strict=True)
                self._change += torch.cat([(now - start).flatten().to(self._dtype) for now, start in changes])
            for buffer, start in zip(self._buffers(), self._start, strict=True):
                buffer.copy_(start)

    def end_step(self, *, real_slots: int, skipped: bool | DeviceFlag) -> None:
        """Advance by the mean change, or not at all where the update was skipped.

        Collective, unless the host knows that it was skipped.
        """
        if not self._places or skipped is True:
            return
        self._sum_over_ranks(self._change)
        means = torch.split(self._change / real_slots, [start.numel() for start in self._start])
        with torch.no_grad():
            for buffer, start, mean in zip(self._buffers(), self._start, means, strict=True):
                mean = mean.view_as(start)
                advanced = start + (mean if start.is_floating_point() else mean.round()).to(start.dtype)
                if isinstance(skipped, DeviceFlag):
                    advanced = torch.where(skipped.on_device.bool(), start, advanced)
                buffer.copy_(advanced)

    def _buffers(self) -> list[Tensor]:
        return [cast(Tensor, owner._buffers[name]) for owner, name in self._places]
