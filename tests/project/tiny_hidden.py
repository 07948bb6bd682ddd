"""Models and optimizers that keep something beside their state dict, and their mended twins."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from tiny import points
from tiny_buffers import Cached, Net, Remembering, Typed, Unsaved
from torch import Tensor, nn
from torch.optim import AdamW


class Counter(Net):
    """Counts its training passes in a plain attribute, which changes nothing yet: it is for later."""

    calls = 0

    def kept(self, inputs: Tensor) -> Any:
        self.calls += self.training
        return 0.0 if self.calls < 10_000 else 1.0


class CounterInBuffer(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def kept(self, inputs: Tensor) -> Any:
        if self.training:
            self.calls += 1
        return 0.0 if self.calls < 10_000 else 1.0


class Running(Net):
    """A running mean in a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.zeros(8)

    def kept(self, inputs: Tensor) -> Any:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * inputs.detach().mean(0)
        return self.mean


class Generator(Net):
    """Draws noise from a generator of its own."""

    def __init__(self, kind: str = "torch") -> None:
        super().__init__()
        self.noise: Any = {
            "torch": torch.Generator().manual_seed(0),
            "numpy": np.random.default_rng(0),
            "python": random.Random(0),
        }[kind]

    def kept(self, inputs: Tensor) -> Any:
        if not self.training:
            return 0.0
        if isinstance(self.noise, torch.Generator):
            return torch.rand(8, generator=self.noise)
        return float(self.noise.random())


class History(Net):
    def __init__(self) -> None:
        super().__init__()
        self.history: list[float] = []

    def kept(self, inputs: Tensor) -> Any:
        if self.training:
            self.history.append(float(inputs.mean()))
        return sum(self.history[-3:])


class Held(Net):
    """Counts in an object of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = SimpleNamespace(calls=0, name="memory")

    def kept(self, inputs: Tensor) -> Any:
        self.memory.calls += self.training
        return 0.01 * self.memory.calls


class Seen(Net):
    """What good models do: keep the last output with its graph, an auxiliary loss, shapes, a callable."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_norm, self.dropout = nn.BatchNorm1d(8), nn.Dropout(0.3)
        self.scale, self.activation = 1.0, torch.tanh

    def kept(self, inputs: Tensor) -> Any:
        self.last = self.net[0](inputs)
        self.auxiliary, self.size = self.last.square().mean(), len(inputs)
        return self.activation(self.dropout(self.batch_norm(inputs)))


class Hooked(Net):
    """Hooks keep activations, in a dictionary that their closures know; and, if asked for, count."""

    def __init__(self, counts: bool = False) -> None:
        super().__init__()
        self.activations: dict[str, Tensor] = {}
        self.calls = 0
        self.net[0].register_forward_hook(lambda _, __, output: self.activations.update(first=output.detach()))
        self.net[2].register_forward_hook(lambda _, __, output: self.activations.update(last=output))
        if counts:
            self.net[2].register_forward_hook(self.count)

    def count(self, *_: Any) -> None:
        self.calls += 1


class Warming(AdamW):
    """Counts its steps beside its state."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, lr=lr)
        self.steps = 0

    def step(self, closure: Any = None) -> Any:
        self.steps += 1
        for group in self.param_groups:
            group["lr"] = 0.01 * min(1.0, self.steps / 10)
        return super().step(closure)


class WarmingInState(AdamW):
    """Counts its steps in its state."""

    def step(self, closure: Any = None) -> Any:
        first = self.param_groups[0]["params"][0]
        steps = int(self.state[first]["step"]) + 1 if self.state[first] else 1
        for group in self.param_groups:
            group["lr"] = 0.01 * min(1.0, steps / 10)
        return super().step(closure)


class Uncopied(Net):
    """Holds what cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.lines = (line for line in "ab")


__all__ = ["Cached", "Remembering", "Typed", "Unsaved", "points"]
