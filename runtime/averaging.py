"""A running average of the weights, evaluated and saved beside the raw ones and never mixed up with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class ExponentialMovingAverage:
    """average <- decay * average + (1 - decay) * weight, once per applied update, for every floating-point parameter.

    Buffers are not averaged: they are the same for both (BatchNorm statistics are an average already).

    Args:
        module: the bare TrainingModule; its trainable parameters must stay the same objects.
        decay: share of the average that is kept.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._decay = decay
        self._parameters = {name: p for name, p in module.named_parameters() if p.is_floating_point()}
        self._average = {name: p.detach().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights of one applied update."""
        torch._foreach_lerp_(
            list(self._average.values()), [p.data for p in self._parameters.values()], 1.0 - self._decay
        )

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Let the module hold the averaged weights for a while."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages by parameter name."""
        return dict(self._average)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state."""
        for name, average in self._average.items():
            average.copy_(state[name])

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self._parameters.items():
            kept = parameter.detach().clone()
            parameter.copy_(self._average[name])
            self._average[name].copy_(kept)
