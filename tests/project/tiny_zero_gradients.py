"""Parameters without a gradient: one that normalisation takes away again, and rows of a table that no sample asks for."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset


class BiasBeforeNorm(nn.Module):
    """BatchNorm subtracts the mean, and with it the bias of the layer before it; float64."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Linear(width, 3)).double()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)


def one_token(size: int = 32) -> TensorDataset:
    """Samples of the token 3 alone."""
    return TensorDataset(torch.full((size,), 3), torch.arange(size) % 7)
