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
