"""What the check of evaluation looks at: an objective with parts, a model that counts its calls, streams that run dry."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from runtime.objective import Loss, Objective
from tests.project.tiny import Mlp, points


class Parted(Objective):
    """Cross entropy with a part of its own."""

    def forward(self, model: nn.Module, batch: Any) -> Loss:
        output = model(batch[0])
        loss = nn.functional.cross_entropy(output, batch[1], reduction="sum")
        return Loss(loss, {"margin": output.detach().abs().sum()}, output)

    def metric_inputs(self, output: Any, batch: Any) -> tuple[Any, ...]:
        return output.softmax(-1), batch[1]


class Counting(nn.Module):
    """Draws in evaluation, too, and has a buffer that each forward pass changes."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(8, 3).double()
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += 1
        return self.line(inputs) + 0.01 * torch.randn(3, dtype=torch.float64)


class Once(IterableDataset[Any]):
    """A stream that can be read once: what has been taken from it is gone."""

    def __init__(self, size: int = 30) -> None:
        inputs, target = points("validation", size).tensors
        self.items = iter([(inputs[i], target[i]) for i in range(size)])

    def __iter__(self) -> Iterator[Any]:
        return (item for item in self.items)


class NoInputs(Parted):
    """Its part for metrics does not work."""

    def metric_inputs(self, output: Any, batch: Any) -> tuple[Any, ...]:
        return output, batch["nothing"]


class NanOfLargeInputs(Mlp):
    """Gives NaN for samples whose first feature is above 1."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return torch.where(inputs[:, :1] > 1.0, torch.nan, super().forward(inputs))
