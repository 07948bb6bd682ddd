"""Models whose tensors are dense in memory and not contiguous."""

from __future__ import annotations

import torch
from tiny import points
from torch import Tensor, nn


class Convolved(nn.Module):
    """8 inputs as an image of 2 channels, 2 by 2.

    Args:
        layout: ``channels_last``; ``late``, the same from the first forward pass on; ``transposed``, a linear weight;
            ``gaps``, a weight that is a view of a larger one; ``contiguous``.
    """

    mean: Tensor

    def __init__(self, layout: str = "channels_last") -> None:
        super().__init__()
        self.layout = layout
        self.first, self.second = nn.Conv2d(2, 5, 2, padding=1), nn.Conv2d(5, 4, 2)
        self.norm = nn.BatchNorm2d(4)
        self.last = nn.Linear(16, 3)
        self.register_buffer("mean", torch.zeros(4, 2, 2).permute(2, 1, 0))
        if layout == "channels_last":
            self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch does it
        elif layout == "transposed":
            self.last.weight = nn.Parameter(self.last.weight.detach().T.contiguous().T)
        elif layout == "gaps":
            self.last.weight = nn.Parameter(torch.cat([self.last.weight.detach()] * 2, 1)[:, :16])

    def forward(self, inputs: Tensor) -> Tensor:
        if self.layout == "late":
            self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch does it
        hidden = self.norm(self.second(torch.tanh(self.first(inputs.view(-1, 2, 2, 2)))))
        if self.training:
            self.mean += hidden.detach().mean(0).permute(2, 1, 0)
        return self.last((hidden + self.mean.permute(2, 1, 0)).flatten(1))


__all__ = ["Convolved", "points"]
