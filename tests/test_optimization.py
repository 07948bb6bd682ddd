"""Parameter groups and fused kernels."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from runtime.objective import Objective, TrainingModule
from runtime.optimization import fused_arguments, parameter_groups

pytestmark = pytest.mark.single


def test_each_parameter_is_in_the_first_group_that_matches() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 1))
    model[2].bias.requires_grad_(False)
    groups, unused = parameter_groups(
        TrainingModule(model, Objective()),
        [(["*.bias"], {"weight_decay": 0.0}), (["1.*", "nothing"], {"lr": 0.5})],
    )
    sizes = [
        (sum(p.numel() for p in group["params"]), {k: v for k, v in group.items() if k != "params"}) for group in groups
    ]
    assert sizes == [(6, {"weight_decay": 0.0}), (3, {"lr": 0.5}), (9, {})]
    assert unused == ["nothing"]


def test_fused_is_chosen_where_torch_has_it_and_the_user_did_not_choose() -> None:
    parameters = [nn.Parameter(torch.zeros(2))]
    assert fused_arguments(AdamW, {}, parameters) == {"fused": True}
    assert fused_arguments(AdamW, {"foreach": True}, parameters) == {}
    assert fused_arguments(AdamW, {"fused": False}, parameters) == {}
    assert fused_arguments(torch.optim.RMSprop, {}, parameters) == {}
    assert fused_arguments(AdamW, {}, [nn.Parameter(torch.zeros(2, dtype=torch.complex64))]) == {}
