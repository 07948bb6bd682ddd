"""Parameter groups and fused kernels."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from runtime.optimization.kernels import kernel_arguments

pytestmark = pytest.mark.single


def test_fused_is_chosen_where_torch_has_it_and_the_user_did_not_choose() -> None:
    parameters = [nn.Parameter(torch.zeros(2))]
    complex_ones = [nn.Parameter(torch.zeros(2, dtype=torch.complex64))]
    assert kernel_arguments(AdamW, {}, parameters, elementwise=False) == {"fused": True}
    assert kernel_arguments(AdamW, {"foreach": True}, parameters, elementwise=False) == {}
    assert kernel_arguments(torch.optim.RMSprop, {}, parameters, elementwise=False) == {}
    assert kernel_arguments(AdamW, {}, complex_ones, elementwise=False) == {}
    for elementwise in (False, True):
        assert kernel_arguments(AdamW, {"fused": False}, parameters, elementwise=elementwise) == {}


def test_kernels_that_round_elements_alike_are_chosen_where_torch_has_them() -> None:
    parameters = [nn.Parameter(torch.zeros(2))]
    assert kernel_arguments(AdamW, {}, parameters, elementwise=True) == {"foreach": True}
    assert kernel_arguments(torch.optim.RMSprop, {}, parameters, elementwise=True) == {"foreach": True}
    assert kernel_arguments(torch.optim.Muon, {}, parameters, elementwise=True) == {}
