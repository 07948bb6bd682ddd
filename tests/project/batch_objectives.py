"""A user's objectives over whole batches."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from runtime.objective import Loss, Objective


class Sum(Objective):
    """Divided by the number of samples."""

    def forward(self, model: nn.Module, batch: Any) -> Loss:
        inputs, target = batch
        output = model(inputs)
        return Loss(F.cross_entropy(output, target, reduction="sum"), output=output)


class Mean(Objective):
    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        inputs, target = batch
        return F.cross_entropy(model(inputs), target)


class Coupled(Objective):
    """Compares each sample with the mean of its batch, which no number of slots cuts."""

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        output = model(batch[0])
        return (output - output.mean(0)).square().sum()
