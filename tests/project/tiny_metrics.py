"""A user's own metrics, and a line to regress."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torchmetrics import Metric


class MeanOfMaximum(Metric):
    """A state that is averaged over ranks: those without data must not count."""

    full_state_update = False
    largest: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("largest", torch.tensor(0.0), dist_reduce_fx="mean")
        self.add_state("count", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, predictions: Tensor, target: Tensor) -> None:
        self.largest = torch.maximum(self.largest, predictions.max())
        self.count += len(target)

    def compute(self) -> Tensor:
        return self.largest / self.count


class Seen(Metric):
    """Counts samples."""

    full_state_update = False
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("count", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, predictions: Tensor, target: Tensor) -> None:
        self.count += len(target)

    def compute(self) -> Tensor:
        return self.count


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1).double()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.linear(inputs).squeeze(-1)


def line(size: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(size)
    inputs = torch.randn(size, 3, generator=generator, dtype=torch.float64)
    noise = torch.randn(size, generator=generator, dtype=torch.float64)
    return TensorDataset(inputs, inputs.sum(-1) + 0.1 * noise)
