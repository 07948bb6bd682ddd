"""Models with every kind of buffer that a forward pass changes, makes or leaves alone."""

from __future__ import annotations

from typing import Any

import torch
from tiny import points
from torch import Tensor, nn

EXOTIC = ["uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2", "bool", "complex64", "bfloat16", "int8"]


class Net(nn.Module):
    """8 inputs to 3 classes; a subclass keeps something and adds it to what goes in."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))

    def kept(self, inputs: Tensor) -> Any:
        return 0.0

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs + self.kept(inputs))


class Unsaved(Net):
    """A running mean and a counter that state_dict leaves out."""

    mean: Tensor
    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8), persistent=False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64), persistent=False)

    def kept(self, inputs: Tensor) -> Any:
        if self.training:
            self.mean.lerp_(inputs.detach().mean(0), 0.1)
            self.calls += 1
        return self.mean * self.calls


class Replaced(Unsaved):
    """The same, by new tensors in the place of the old ones."""

    def kept(self, inputs: Tensor) -> Any:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * inputs.detach().mean(0)
            self.calls = self.calls + 1
        return self.mean * self.calls


class Late(Net):
    """Buffers that state_dict leaves out and that do not change before the third step.

    Args:
        counts: they change by one each; otherwise by what the inputs say.
    """

    steps: Tensor
    late: Tensor
    on: Tensor

    def __init__(self, counts: bool = False) -> None:
        super().__init__()
        self.counts = counts
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("late", torch.zeros(8), persistent=False)
        self.register_buffer("on", torch.zeros((), dtype=torch.bool), persistent=False)

    def kept(self, inputs: Tensor) -> Any:
        if self.training:
            self.steps += 1
            if self.steps >= 3:
                self.late.lerp_(inputs.detach().mean(0), 0.1) if not self.counts else self.late.add_(1)
                self.on.fill_(True)
        return 0.1 * self.late + self.on


class Cached(Net):
    """A table that the first forward pass makes.

    Args:
        how: ``saved``, ``unsaved``; ``none``: declared as None before; ``flag``: made once, as a flag remembers.
    """

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.made = how, False
        if how == "none":
            self.register_buffer("table", None)

    def kept(self, inputs: Tensor) -> Any:
        if getattr(self, "table", None) is None and not self.made:
            self.register_buffer("table", torch.linspace(0, 1, 8), persistent=self.how != "unsaved")
            self.made = self.how == "flag"
        return self.table


class Typed(Net):
    """Buffers of every type: constants, an expanded one, and those that count."""

    wide: Tensor
    least: Tensor
    ids: Tensor
    bfloat16_unsaved: Tensor

    def __init__(self, changes: bool = True) -> None:
        super().__init__()
        self.changes = changes
        for name in EXOTIC:
            self.register_buffer(f"{name}_saved", torch.ones(3, dtype=torch.uint8).to(getattr(torch, name)))
            self.register_buffer(f"{name}_unsaved", torch.zeros(3).to(getattr(torch, name)), persistent=False)
        self.register_buffer("wide", torch.tensor([0.5]).expand(8))
        self.register_buffer("least", torch.full((8,), torch.inf))
        self.register_buffer("ids", torch.zeros(2, dtype=torch.int64))

    def kept(self, inputs: Tensor) -> Any:
        if self.training and self.changes:
            self.least = torch.minimum(self.least, inputs.detach().amin(0))
            self.ids.fill_(2**40 + 1)
            for name in EXOTIC:
                for key in (f"{name}_saved", f"{name}_unsaved"):
                    held = getattr(self, key)
                    more = torch.full((3,), 2.0).to(torch.complex64 if held.is_complex() else torch.float64)
                    wide = more.dtype
                    held.copy_((held.to(wide) + more).to(held.dtype))
        return self.wide + torch.nan_to_num(self.least, posinf=0.0) + self.bfloat16_unsaved.float().sum()


class Remembering(Net):
    """Extra state: plain data and tensors.

    Args:
        kind: what else is in it.
    """

    def __init__(self, kind: str = "plain") -> None:
        super().__init__()
        self.net.add_module("memory", Memory(kind))


class Memory(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.calls, self.mean = kind, 0, torch.zeros(3)

    def get_extra_state(self) -> Any:
        odd = {"set": {1, 2}, "object": self, "function": len, "plain": [None, (True, "a"), b"raw", 2.5]}[self.kind]
        return {"calls": self.calls, "nested": {"mean": self.mean, 3: odd}}

    def set_extra_state(self, state: Any) -> None:
        self.calls, self.mean = state["calls"], state["nested"]["mean"]
        assert state["nested"][3] == [None, (True, "a"), b"raw", 2.5]

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
            self.mean = self.mean + inputs.detach().mean(0)
        return inputs + self.mean * self.calls


__all__ = ["Cached", "Late", "Net", "Remembering", "Replaced", "Typed", "Unsaved", "points"]
