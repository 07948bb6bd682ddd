"""Models and objectives that raise when they are called."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from runtime.objective import Objective


class Narrow(nn.Module):
    """Its second layer takes another width than its first gives."""

    def __init__(self, dtype: str = "float64") -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.Linear(17, 3)).to(getattr(torch, dtype))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(inputs)  # the line that is told


class Wordy(nn.Module):
    """Takes another argument than it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(8, 3).double()

    def forward(self, inputs: Tensor, mask: Tensor) -> Tensor:
        return self.line(inputs) * mask


class Broken(Objective):
    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        return (model(batch[0]) - torch.zeros(2)).sum()  # shapes that do not go together


class Raising(nn.Module):
    """Raises what it is told to."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.words = nn.Embedding(5, 3).double()

    def forward(self, inputs: Tensor) -> Tensor:
        if self.kind == "attribute":
            return self.skip_connection(inputs)  # type: ignore[operator]  # a missing attribute
        if self.kind == "file":
            raise FileNotFoundError(2, "No such file", "weights.bin")  # a missing file
        if self.kind == "connection":
            raise RuntimeError("a connection of another size")  # about a connection
        if self.kind == "numbers":
            return self.words(inputs)  # numbers for words
        return self.words(inputs.abs().long() + 5)  # words beyond the last
