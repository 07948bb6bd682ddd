"""Models whose steps do not use every parameter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Branches(nn.Module):
    """A trunk, and branches of which a batch uses those that its first input says.

    Args:
        uses: ``never``: no branch. ``some``: the first for a batch whose first input is positive, the second for no batch.
            ``late``: the first from the third training step on (counted by a buffer).
        aux: also return what the second branch makes, which no loss looks at.
    """

    seen: Tensor

    def __init__(self, uses: str = "some", aux: bool = False, dtype: str = "float64") -> None:
        super().__init__()
        self.trunk = nn.Linear(8, 6)
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)
        self.uses, self.aux = uses, aux
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.to(getattr(torch, dtype))

    def forward(self, inputs: Tensor) -> Any:
        hidden = torch.tanh(self.trunk(inputs))
        if self.training:
            self.seen += 1
        if (self.uses == "some" and inputs[0, 0] > 0.8) or (self.uses == "late" and int(self.seen) > 2):
            hidden = hidden + self.first(hidden)
        output = self.head(hidden)
        return {"logits": output, "aux": self.second(hidden)} if self.aux else output


class Lazy(nn.Module):
    """Its first layer learns its size from the first batch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.LazyLinear(6), nn.Tanh(), nn.Linear(6, 3))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)


class Sparse(nn.Module):
    """An embedding with sparse gradients: a module's, or a call of the functional one."""

    def __init__(self, functional: bool = False) -> None:
        super().__init__()
        self.functional = functional
        self.words = nn.Embedding(4, 6, sparse=not functional)
        self.head = nn.Linear(6, 3)
        self.double()

    def forward(self, inputs: Tensor) -> Tensor:
        rows = (inputs[:, 0] > 0).long()
        words = nn.functional.embedding(rows, self.words.weight, sparse=True) if self.functional else self.words(rows)
        return self.head(words)


class Normed(nn.Module):
    """A normalisation of the inputs, as a vector or as pictures of two by four.

    Args:
        kind: ``1d``, ``2d``, ``2d of one element``, ``instance`` (over one element), ``layer``.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        shapes = {"2d": (1, 2, 4), "2d of one element": (8, 1, 1), "instance": (8, 1)}
        self.shape = shapes.get(kind, (8,))
        norms = {
            "1d": nn.BatchNorm1d(8),
            "2d": nn.BatchNorm2d(1),
            "2d of one element": nn.BatchNorm2d(8),
            "instance": nn.InstanceNorm1d(8, affine=True),
            "layer": nn.LayerNorm(8),
        }
        self.norm, self.head = norms[kind], nn.Linear(8, 3)
        self.calls = 0
        self.generator = torch.Generator()
        self.double()

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += 1
        torch.rand(1, generator=self.generator)
        return self.head(self.norm(inputs.view(-1, *self.shape)).flatten(1))
