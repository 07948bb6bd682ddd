"""Keys of an optimizer's state per parameter, determined by a trial step on a small matrix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Optimizer

from runtime.optimization.combined import members
from runtime.optimization.trial_steps import trial_copy, trial_step


def missing_keys(optimizer: Optimizer, state: Mapping[str, Any]) -> set[str]:
    """Return the keys that the optimizer's next step needs and a loaded state lacks.

    Args:
        state: an optimizer state dict in torch's format, with the same groups.
    """
    groups = iter(state["param_groups"])
    missing: set[str] = set()
    for member in members(optimizer):
        for group in [next(groups) for _ in member.param_groups]:
            entries = [entry for number in group["params"] if (entry := state["state"].get(number))]
            if entries and type(member) is not SGD:  # SGD creates a missing momentum buffer at any step
                missing |= _state_keys(member, group) - set().union(*entries)
    return missing


def _state_keys(optimizer: Optimizer, group: Mapping[str, Any]) -> set[str]:
    parameter = nn.Parameter(torch.ones(2, 2))
    parameter.grad = torch.ones(2, 2)
    kernels = {key: False for key in ("fused", "foreach") if key in group}
    copy = trial_copy(optimizer, {**group, **kernels}, [parameter])
    try:
        trial_step(copy)
    except Exception:
        return set()
    return set(copy.state[parameter])
