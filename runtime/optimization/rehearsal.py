"""Schedules and optimizers tried on stand-ins of one element a group, so that what raises at its first call is told before."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from runtime.config.component import ComponentError, described
from runtime.optimization.trial_steps import trial_step

_OF_REAL_TENSORS = ("foreach", "fused", "capturable", "differentiable")


class StandIn(Optimizer):
    """An optimizer with the options of another one's groups, and next to no parameters.

    Args:
        rates: of each group before any schedule. Default: those that the groups have.
    """

    def __init__(self, optimizer: Optimizer, rates: Sequence[float] | None = None) -> None:
        groups = [{**_options(group), "params": [nn.Parameter(torch.zeros(1))]} for group in optimizer.param_groups]
        for group, rate in zip(groups, rates or [], strict=False):
            group["lr"] = rate
        super().__init__(groups, deepcopy(getattr(optimizer, "defaults", {})))

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Change nothing."""


def try_optimizer(optimizer: Optimizer, name: str) -> None:
    """Let one of torch's own optimizers make an update of stand-ins: it may take arguments that it dies of later.

    A class of the user's own may need more than that; what it raises is told at its first update.

    Raises:
        ComponentError: it raised.
    """
    made = type(optimizer)
    if not made.__module__.startswith("torch.optim"):
        return
    groups = []
    for group in optimizer.param_groups:
        parameter = nn.Parameter(torch.ones(2, 2))
        parameter.grad = torch.ones(2, 2)
        plain = {key: None if key in ("foreach", "fused") else False for key in _OF_REAL_TENSORS if key in group}
        groups.append({**_options(group), **plain, "params": [parameter]})
    try:
        trial_step(made(groups))  # type: ignore[call-arg]  # each of torch's has the rest by default
    except Exception as error:
        raise ComponentError(f"{name} raised {described(error)} at its first update", ("args",)) from error


def try_scheduler(scheduler: Any, name: str) -> None:
    """Step a scheduler that was built on a stand-in.

    Raises:
        ComponentError: it raised.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch misses the optimizer's steps
            for _ in range(2):
                scheduler.step(1.0) if isinstance(scheduler, ReduceLROnPlateau) else scheduler.step()
    except Exception as error:
        raise ComponentError(f"{name} raised {described(error)} at its first step", ("args",)) from error


def raised_within(error: BaseException, *parts: Any) -> bool:
    """Tell whether an error was raised in a method of one of the parts, or in what it called."""
    trace = error.__traceback__
    while trace is not None:
        own = trace.tb_frame.f_locals.get("self")
        if own is not None and any(own is part for part in parts):
            return True
        trace = trace.tb_next
    return False


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: deepcopy(value) for key, value in group.items() if key not in ("params", "initial_lr")}
