"""What makes the weights of ranks part, and what only seems to."""

from __future__ import annotations

from typing import Any

import torch
from tiny import Mlp
from torch import Tensor, nn
from torch.optim import Optimizer


class Langevin(Optimizer):
    """Adds noise to each update.

    Args:
        own: draws it from a generator of its own, which is seeded by chance; otherwise from torch's.
    """

    def __init__(self, params: Any, lr: float = 0.01, own: bool = False) -> None:
        self.generator = torch.Generator() if own else None
        if self.generator is not None:
            self.generator.seed()
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # as users write it
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    noise = torch.randn(parameter.shape, generator=self.generator, dtype=parameter.dtype)
                    parameter.add_(parameter.grad, alpha=-group["lr"]).add_(noise, alpha=0.01)


class Wandering(Mlp):
    """Writes to its first weight in each forward pass, by what the samples are."""

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            self.net[0].weight.data.mul_(1 - 0.001 * float(inputs[0, 0]))
        return super().forward(inputs)


class Turning(nn.Module):
    """Complex weights."""

    def __init__(self) -> None:
        super().__init__()
        self.turn = nn.Parameter(torch.randn(8, 3, dtype=torch.complex64))
        self.bias = nn.Parameter(torch.zeros(3))

    def forward(self, inputs: Tensor) -> Tensor:
        return (inputs.to(torch.complex64) @ self.turn).abs() + self.bias
