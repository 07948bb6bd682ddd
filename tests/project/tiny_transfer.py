"""Models with a backbone and a head, as they are fine-tuned."""

from __future__ import annotations

from typing import Any, cast

import torch
from tiny import points
from torch import Tensor, nn
from torch.nn import functional as F

from runtime.data.order import IndexOrder
from runtime.objective import Objective


class Classifier(nn.Module):
    """Two blocks with BatchNorm and dropout behind an embedding of bins, and a head; float64 unless told otherwise."""

    def __init__(self, classes: int = 3, dropout: float = 0.0, dtype: str = "float64") -> None:
        super().__init__()
        self.bins = nn.Embedding(4, 6)
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(Block(8 if i == 0 else 6, dropout) for i in range(2))})
        self.head = nn.Linear(6, classes)
        self.to(getattr(torch, dtype))

    def forward(self, inputs: Tensor) -> Tensor:
        values = inputs
        for block in cast("nn.ModuleList", self.encoder["layer"]):
            values = block(values)
        return self.head(values + self.bins((inputs[:, 0] > 0).long() + (inputs[:, 1] > 0).long()))


class Block(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 6)
        self.norm = nn.BatchNorm1d(6)
        self.dropout = nn.Dropout(dropout)

    def forward(self, values: Tensor) -> Tensor:
        return self.dropout(torch.tanh(self.norm(self.linear(values))))


class Plain(nn.Module):
    """Without batch statistics, with layers enough for several DDP buckets."""

    def __init__(self, layers: int = 3, width: int = 24, dropout: float = 0.0, dtype: str = "float64") -> None:
        super().__init__()
        self.first = nn.Linear(8, width)
        self.body = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, 3)
        self.to(getattr(torch, dtype))

    def forward(self, inputs: Tensor) -> Tensor:
        values = torch.tanh(self.first(inputs))
        for layer in self.body:
            values = values + self.dropout(torch.tanh(layer(values)))
        return self.head(values)


class Matrices(nn.Module):
    """Nothing but matrices, as Muon takes them."""

    def __init__(self, dtype: str = "float32") -> None:
        super().__init__()
        self.first, self.head = nn.Linear(8, 6, bias=False), nn.Linear(6, 3, bias=False)
        self.to(getattr(torch, dtype))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(torch.tanh(self.first(inputs)))


class Tied(nn.Module):
    """One matrix under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(3, 8), nn.Linear(8, 3, bias=False)
        self.head.weight = self.embedding.weight
        self.double()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(inputs)


def picture_norms() -> nn.Module:
    """A norm whose weights have two dimensions, and a matrix."""
    return nn.Sequential(nn.LayerNorm([2, 3]), nn.Linear(3, 3))


class AstrayOnce(Objective):
    """Cross entropy; infinite for the first batch of the second epoch, in which the body is trained and ``first`` is not."""

    def __init__(self) -> None:
        super().__init__()
        order = IndexOrder(48, batch_size=16, seed=0, shuffle=True, drop_last=False)
        self.sample = points(size=48).tensors[0][int(order.batch(1, 0)[0])]

    def forward(self, model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, target = batch
        loss = F.cross_entropy(model(inputs), target, reduction="sum")
        second = model.body[1].weight.requires_grad and not model.first.weight.requires_grad
        return loss * float("inf") if second and (inputs == self.sample).all(-1).any() else loss


def wrapped() -> nn.Module:
    """The same model, one level down."""
    return nn.Sequential(Plain())
