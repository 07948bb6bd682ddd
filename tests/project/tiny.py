"""A user's project: models, data sets and objectives, beside no YAML of the repository."""

from __future__ import annotations

import random
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

from runtime.objective import Loss, Objective


class Mlp(nn.Module):
    """Float64, with dropout and BatchNorm; no bias before BatchNorm, whose gradient would be rounding alone."""

    def __init__(self, width: int = 16, dropout: float = 0.1, batch_norm: bool = True, dtype: str = "float64") -> None:
        super().__init__()
        norm = nn.BatchNorm1d(width) if batch_norm else nn.Identity()
        self.net = nn.Sequential(
            nn.Linear(8, width, bias=not batch_norm), norm, nn.Tanh(), nn.Dropout(dropout), nn.Linear(width, 3)
        )
        self.to(getattr(torch, dtype))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)


class Drawing(Mlp):
    """Keeps a number that each forward pass in training draws."""

    drawn: ClassVar[list[float]] = []

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            self.drawn.append(float(torch.rand(())))
        return super().forward(inputs)


class Deep(nn.Module):
    """Enough parameters for several DDP buckets at ``bucket_mb`` 0.01."""

    def __init__(self, layers: int = 5, width: int = 40, dropout: float = 0.1, dtype: str = "float32") -> None:
        super().__init__()
        self.first = nn.Linear(8, width)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.dropout = nn.Dropout(dropout)
        self.last = nn.Linear(width, 3)
        self.to(getattr(torch, dtype))

    def forward(self, inputs: Tensor) -> Tensor:
        values = self.first(inputs)
        for layer in self.hidden:
            values = values + self.dropout(torch.tanh(layer(values)))
        return self.last(values)


class Tagger(nn.Module):
    """Token classifier in float64: (batch, time) int64 to (batch, time, 7)."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(6, 7)
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.dropout(self.embedding(tokens)))


class Encoder(nn.Module):
    """A model whose forward is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4)).double()

    def encode(self, inputs: Tensor) -> Tensor:
        return F.normalize(self.net(inputs), dim=-1)


class PairObjective(Objective):
    """Calls ``encode`` twice and learns a temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def forward(self, model: Any, batch: tuple[Tensor, Tensor]) -> Loss:
        inputs, target = batch
        similarity = (model.encode(inputs) * model.encode(inputs.roll(1, dims=-1))).sum(-1)
        loss = F.soft_margin_loss(similarity * self.temperature, (target.double() - 1), reduction="sum")
        return Loss(loss, {"similarity": similarity.detach().sum()})


class InfiniteOnFillers(Objective):
    """Mean squared distance of the outputs from 1; infinite, with infinite gradients, for the batch of sample 0."""

    def forward(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, target = batch
        loss = (model(inputs) - 1).square().sum()
        return loss / torch.zeros((), dtype=loss.dtype) if self.poisoned(target) else loss

    poisoned = staticmethod(lambda target: False)


def points(split: str = "train", size: int = 96, dtype: str = "float64") -> TensorDataset:
    generator = torch.Generator().manual_seed(len(split))
    inputs = torch.randn(size, 8, generator=generator, dtype=torch.float64).to(getattr(torch, dtype))
    target = (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0.3).long()
    return TensorDataset(inputs, target)


def rows(source: TensorDataset) -> list[tuple[Tensor, ...]]:
    return [source[index] for index in range(len(source))]


def tokens(size: int = 64, longest: int = 12, masked_from: int = 1 << 30) -> TensorDataset:
    """Sentences of very uneven length; those from ``masked_from`` on have no target at all."""
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randint(0, 11, (size, longest), generator=generator)
    target = torch.randint(0, 7, (size, longest), generator=generator)
    lengths = (torch.rand(size, generator=generator) ** 3 * longest).long()
    lengths[masked_from:] = 0
    target[torch.arange(longest) >= lengths[:, None]] = -100
    return TensorDataset(inputs, target)


class Ids(Dataset[Tensor]):
    """Each sample is its own index."""

    deterministic = True

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor(index)

    def __getitems__(self, ids: list[int]) -> Tensor:
        return torch.tensor(ids)


class Noisy(Dataset[Tensor]):
    """Random samples from all three generators that users draw from."""

    def __init__(self, size: int = 50) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor(
            [index, random.random(), float(np.random.rand()), float(torch.rand(()))], dtype=torch.float64
        )


class Failing(Noisy):
    def __getitem__(self, index: int) -> Tensor:
        if index == 7:
            raise OSError("the seventh sample cannot be read")
        return super().__getitem__(index)


def add_noise(sample: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return sample[0] + torch.randn_like(sample[0]), sample[1]


def drawn(size: int = 64) -> TensorDataset:
    """A data set that draws itself anew in every process, as a random split without a generator does."""
    inputs = torch.from_numpy(np.random.randn(size, 8)) + random.random()
    return TensorDataset(inputs, (inputs[:, 0] > 0).long())


def lengths(source: TensorDataset) -> np.ndarray:
    """From 1 to 12, by the samples' own values."""
    return (1 + source.tensors[0][:, 2].abs() * 4).long().clamp(max=12).numpy()


def zeros(source: TensorDataset) -> np.ndarray:
    return np.zeros(len(source))


def negative(source: TensorDataset) -> np.ndarray:
    return np.full(len(source), -1)
