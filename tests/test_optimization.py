"""Parameter groups and fused kernels."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from runtime.optimization.fused import fused_arguments

pytestmark = pytest.mark.single


def test_fused_is_chosen_where_torch_has_it_and_the_user_did_not_choose() -> None:
    parameters = [nn.Parameter(torch.zeros(2))]
    assert fused_arguments(AdamW, {}, parameters) == {"fused": True}
    assert fused_arguments(AdamW, {"foreach": True}, parameters) == {}
    assert fused_arguments(AdamW, {"fused": False}, parameters) == {}
    assert fused_arguments(torch.optim.RMSprop, {}, parameters) == {}
    assert fused_arguments(AdamW, {}, [nn.Parameter(torch.zeros(2, dtype=torch.complex64))]) == {}
