"""Models and data whose training amplifies rounding, so that any difference in a sum is seen after some steps."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset, TensorDataset


class Normed(nn.Module):
    """A bias before BatchNorm: its true gradient is zero, and Adam divides what is left, rounding, by rounding.

    Args:
        shared: use one layer twice.
        sometimes: have a branch that only batches with a positive first number use.
    """

    def __init__(
        self,
        outputs: int = 3,
        width: int = 16,
        dropout: float = 0.1,
        batch_norm: bool = True,
        shared: bool = False,
        sometimes: bool = False,
        dtype: str = "float32",
    ) -> None:
        super().__init__()
        self.first = nn.Linear(8, width)
        self.norm = nn.BatchNorm1d(width) if batch_norm else nn.LayerNorm(width)
        self.hidden = nn.Linear(width, width)
        self.again = self.hidden if shared else nn.Linear(width, width)
        self.branch = nn.Linear(width, width) if sometimes else None
        self.dropout = nn.Dropout(dropout)
        self.last = nn.Linear(width, outputs)
        self.to(getattr(torch, dtype))

    def forward(self, inputs: Tensor) -> Tensor:
        values = torch.tanh(self.norm(self.first(inputs)))
        values = values + self.dropout(torch.tanh(self.again(torch.relu(self.hidden(values)))))
        if self.branch is not None and inputs[0, 0] > 0:
            values = values + self.branch(values)
        return self.last(values)


class NegativeZero(nn.Module):
    """A weight whose gradient is -0.0 in batches with a positive first number, while others do not use it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 3)
        self.weight = nn.Parameter(torch.ones(1, 3))

    def forward(self, inputs: Tensor) -> Tensor:
        values = self.linear(inputs)
        if inputs[0, 0] > 0:
            values = torch.cat([values[:1] + self.weight * -0.0, values[1:]])
        return values + 100.0  # above every target, so the loss rises with each


class Unseeded(Normed):
    """Its first weights come from the system's randomness, so each process builds another model."""

    def __init__(self) -> None:
        super().__init__()
        values = [byte / 256 for byte in os.urandom(self.first.weight.numel())]
        with torch.no_grad():
            self.first.weight.copy_(torch.tensor(values).view_as(self.first.weight))


class Words(nn.Module):
    """Token classifier: (batch, time) int64 to (batch, time, 7); the head's weight is not the embedding's."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.norm = nn.LayerNorm(8)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(8, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.dropout(self.norm(self.embedding(tokens))))


def samples(kind: str = "classes", size: int = 92, seed: int = 0) -> TensorDataset:
    """Inputs (size, 8) and targets: classes, several yes or no, or numbers of very different size."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(size, 8, generator=generator)
    if kind == "classes":
        return TensorDataset(inputs, (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0.3).long())
    if kind == "labels":
        return TensorDataset(inputs, (inputs[:, :3] > 0.2).float())
    return TensorDataset(inputs, inputs[:, :3] * torch.tensor([1.0, 1e3, 1e-3]) + 0.3)


class Stream(IterableDataset[tuple[Tensor, ...]]):
    """The same samples in their order."""

    def __init__(self, kind: str = "classes", size: int = 92) -> None:
        self._samples = samples(kind, size)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        return (self._samples[number] for number in range(len(self._samples)))
