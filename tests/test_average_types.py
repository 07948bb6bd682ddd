"""Averages of weights in any type are as exact as float32, or as the weights are."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

from runtime.config.learning import AveragingSection
from runtime.optimization.averaging import WeightAverage, averaged_state

pytestmark = pytest.mark.single
UPDATES, DECAY = 1000, 0.999


def averaged_by(dtype: torch.dtype, section: AveragingSection) -> tuple[Any, WeightAverage]:
    """A weight that is 0 at first and 2 (with 2i where there is an imaginary part) from then on, and a constant integer."""
    module: Any = nn.Module()
    module.weight = nn.Parameter(torch.zeros(3, dtype=dtype))
    module.number = nn.Parameter(torch.tensor([7]), requires_grad=False)
    average = WeightAverage(module, section)
    for _ in range(UPDATES + 1):
        average.update()
        if average.count == 1:
            with torch.no_grad():
                module.weight.fill_(2 + 2j if dtype.is_complex else 2)
    return module, average


@pytest.mark.parametrize("kind", ["ema", "swa"])
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.complex64, torch.complex128]
)
def test_the_average_moves_by_its_formula_in_every_type(dtype: torch.dtype, kind: str) -> None:
    swa = {"kind": "swa", "start": "1 step", "every": "1 step"}
    section = AveragingSection.model_validate({"decay": DECAY} if kind == "ema" else swa)
    module, average = averaged_by(dtype, section)
    truth = 2 * (1 - DECAY**UPDATES) if kind == "ema" else 2 * (UPDATES - 1) / UPDATES
    expected = truth * (1 + 1j) if dtype.is_complex else truth
    precision = 1e-12 if dtype in (torch.float64, torch.complex128) else 1e-4
    stored = average.state_dict()
    assert (stored["average"]["weight"] - expected).abs().max() < precision
    for _ in range(2):  # looking at it changes nothing
        with average.swapped_in():
            assert module.weight.dtype == dtype
            assert module.number.item() == 7
            torch.testing.assert_close(module.weight.detach(), torch.full((3,), expected).to(dtype))
        assert torch.equal(average.state_dict()["average"]["weight"], stored["average"]["weight"])
    assert module.weight[0].real.item() == 2.0


def test_what_is_exported_has_the_models_types() -> None:
    module, average = averaged_by(torch.bfloat16, AveragingSection(decay=DECAY))
    stored = average.state_dict()
    stored = {**stored, "average": {f"model.{name}": value for name, value in stored["average"].items()}}
    state = OrderedDict((name, value.detach()) for name, value in module.named_parameters())
    exported = averaged_state({**state, "tied": state["weight"]}, stored)
    assert exported["weight"].dtype == torch.bfloat16
    assert exported["tied"] is exported["weight"]
