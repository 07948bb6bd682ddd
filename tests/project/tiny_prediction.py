"""Data to predict: without a target, with names, and such that something happens half-way."""

from __future__ import annotations

import os
import signal
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from tests.project.tiny import points

_NAMES = ("ä b", 'quoted "c"', "comma, d", "e")


def name_of(index: int) -> str:
    return f"{_NAMES[index % 4]}-{index}"


def alone(size: int = 103) -> TensorDataset:
    """Tuples of one."""
    return TensorDataset(points("validation", size).tensors[0])


class Inputs(Dataset[Any]):
    """The validation inputs without a target, bare or with names; the process gets a signal while sample ``at`` is read."""

    def __init__(
        self, size: int = 103, named: bool = False, at: int = -1, number: int = signal.SIGTERM, rank: int = 0
    ) -> None:
        self.inputs = points("validation", size).tensors[0]
        self.named, self.at, self.number, self.rank = named, at, number, rank

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> Any:
        if index == self.at and int(os.environ.get("RANK", "0")) == self.rank:
            os.kill(os.getpid(), self.number)
        if self.named:
            return {"x": self.inputs[index], "name": name_of(index)}
        return self.inputs[index]


class Cheap(Dataset[Any]):
    """Any number of samples that take no memory."""

    deterministic = True

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitems__(self, ids: list[int]) -> Tensor:
        return torch.tensor(ids, dtype=torch.float64)[:, None].expand(-1, 8).contiguous()

    def __getitem__(self, index: int) -> Tensor:
        return self.__getitems__([index])[0]


class Drawing(nn.Module):
    """Draws random numbers also where it is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(8, 3).double()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.line(inputs) + torch.randn(3, dtype=torch.float64)


def flat() -> nn.Module:
    """Scores of three classes for images of 4 x 4 in colour."""
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 3))


class Bag(nn.Module):
    """Scores of two classes for bytes, 0 for padding."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(256, 2, padding_idx=0)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.bag(inputs)
