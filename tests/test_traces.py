"""Trying a module out leaves no trace in it, whatever it keeps."""

from __future__ import annotations

import random
from collections import deque
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from runtime.checks.traces import left_as_it_was

pytestmark = pytest.mark.single


class Keeping(nn.Module):
    """Changes all that it keeps in each pass, in place and by new values."""

    mean: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.LSTM(2, 2)  # keeps a list of its own parameters
        self.register_buffer("mean", torch.zeros(2))
        self._private, self.public, self.text = 0, 0, "none"
        self.running, self.history = torch.zeros(2), [1.0]
        self.nested: dict[str, Any] = {
            "last": deque([1], maxlen=2),
            "seen": {1},
            "array": np.zeros(2),
            "pair": (torch.ones(1), []),
        }
        self.helper = SimpleNamespace(calls=0, shadow={"weight": torch.zeros(2)})
        self.helper.me = self.helper
        self.generators: list[Any] = [torch.Generator().manual_seed(1), np.random.default_rng(1), random.Random(1)]

    def forward(self, inputs: Tensor) -> Tensor:
        output = self.inner(inputs)[0]
        self._private += 1
        self.public, self.text, self.made = self.public + 1, "some", output
        self.running = self.running + 1
        self.mean += 1
        self.history.append(float(output.detach().sum()))
        self.nested["last"].append(2)
        self.nested["seen"].add(2)
        self.nested["array"] += 1
        self.nested["pair"][0].add_(1)
        self.nested["pair"][1].append(1)
        self.helper.calls += 1
        self.helper.shadow["weight"].add_(1)
        torch.rand(1, generator=self.generators[0])
        self.generators[1].random()
        self.generators[2].random()
        return output


def kept(module: Keeping) -> Any:
    facts: list[Any] = [module.training, module._private, module.public, module.text, module.history, module.nested]
    facts += [module.running, module.mean, module.helper.calls, module.helper.shadow, hasattr(module, "made")]
    torchs, numpys, pythons = module.generators
    return repr([*facts, torchs.get_state(), numpys.bit_generator.state, pythons.getstate()])


def test_all_that_a_module_keeps_is_put_back() -> None:
    module = Keeping()
    before, running, weights = kept(module), module.running, module.inner._flat_weights
    with left_as_it_was(module, training=False):
        assert not module.training
        module(torch.ones(1, 1, 2))
        changed = kept(module)
    assert changed != before
    assert kept(module) == before
    assert module.running is running
    assert all(one is other for one, other in zip(weights, module.inner.parameters(), strict=True))
    module(torch.ones(1, 1, 2))  # and it still works
