"""Models whose blocks are sharded, and data that leaves ranks with uneven work."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from runtime.model_zoo.gpt import GPT


class Gpt(nn.Module):
    """The GPT of the model zoo, shrunk, in float64; (batch, time) int64 to (batch, classes, time)."""

    def __init__(self, dropout: float = 0.1, dtype: str = "float64", num_layers: int = 2) -> None:
        super().__init__()
        self.gpt = GPT(23, 10, num_layers=num_layers, num_heads=2, width=12, dropout=dropout)
        self.to(getattr(torch, dtype))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.gpt(tokens).transpose(1, 2)


class HalfHead(Gpt):
    """Its last layer is of another type than the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.gpt.final_norm.to(torch.float32)


def sentences(size: int = 64, longest: int = 10) -> TensorDataset:
    """Sentences of very uneven length; every eighth has no target at all."""
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(0, 23, (size, longest), generator=generator)
    target = torch.randint(0, 23, (size, longest), generator=generator)
    lengths = (torch.rand(size, generator=generator) ** 3 * longest).long() + 1
    lengths[::8] = 0
    target[torch.arange(longest) >= lengths[:, None]] = -100
    return TensorDataset(tokens, target)
