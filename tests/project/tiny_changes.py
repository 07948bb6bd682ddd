"""Parts whose arguments become state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from runtime.objective import Objective


class Scaled(nn.Module):
    """Divides its inputs by a buffer that is an argument, and counts its calls in one that is not."""

    scale: Tensor
    mean: Tensor

    def __init__(self, scale: float = 1.0, dropout: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("scale", torch.full((8,), scale, dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(8, dtype=torch.float64))
        self.dropout = nn.Dropout(dropout)
        self.net = nn.Linear(8, 3).double()

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            self.mean += 0.1 * (inputs.detach().mean(0) - self.mean)
        return self.net(self.dropout(inputs / self.scale))


class Tempered(Objective):
    """Cross entropy at a temperature that is trained, with weights of classes in a saved buffer."""

    classes: Tensor

    def __init__(self, temperature: float = 1.0, first_class: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("classes", torch.tensor([first_class, 1.0, 1.0], dtype=torch.float64))
        self.temperature = nn.Parameter(torch.tensor(temperature, dtype=torch.float64))

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        inputs, target = batch
        logits = model(inputs) / self.temperature
        return F.cross_entropy(logits, target, self.classes, reduction="sum")


def halving(count: int) -> float:
    return 0.5**count
