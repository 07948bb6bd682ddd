"""Tries schedules and optimizers on stand-ins with one element per group, to report errors of their first call early."""

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

_IMPLEMENTATION_OPTIONS = ("foreach", "fused", "capturable", "differentiable")


class StandIn(Optimizer):
    """An optimizer with the options of another one's groups, and one element per group.

    Args:
        rates: of each group before any schedule. Default: the groups' current rates.
    """

    def __init__(self, optimizer: Optimizer, rates: Sequence[float] | None = None) -> None:
        groups = [{**_options(group), "params": [nn.Parameter(torch.zeros(1))]} for group in optimizer.param_groups]
        for group, rate in zip(groups, rates or [], strict=False):
            group["lr"] = rate
        super().__init__(groups, deepcopy(getattr(optimizer, "defaults", {})))

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Do nothing."""


def try_optimizer(optimizer: Optimizer, name: str) -> None:
    """Make an update of stand-ins with one of torch's optimizers: it may accept arguments that raise in the first step.

    A user's class may need more than stand-ins; its errors are reported at the first real update.

    Raises:
        ComponentError: the update raised.
    """
    optimizer_class = type(optimizer)
    if not optimizer_class.__module__.startswith("torch.optim"):
        return
    groups = []
    for group in optimizer.param_groups:
        parameter = nn.Parameter(torch.ones(2, 2))
        parameter.grad = torch.ones(2, 2)
        plain = {key: None if key in ("foreach", "fused") else False for key in _IMPLEMENTATION_OPTIONS if key in group}
        groups.append({**_options(group), **plain, "params": [parameter]})
    try:
        trial_step(optimizer_class(groups))  # type: ignore[call-arg]  # torch's have defaults for the rest
    except Exception as error:
        raise ComponentError(f"{name} raised {described(error)} at its first update", ("args",)) from error


def try_scheduler(scheduler: Any, name: str) -> None:
    """Step a scheduler that was built on a stand-in.

    Raises:
        ComponentError: a step raised.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch warns that the optimizer was not stepped
            for _ in range(2):
                scheduler.step(1.0) if isinstance(scheduler, ReduceLROnPlateau) else scheduler.step()
    except Exception as error:
        raise ComponentError(f"{name} raised {described(error)} at its first step", ("args",)) from error


def raised_within(error: BaseException, *parts: Any) -> bool:
    """Return whether an error was raised in a method of one of the objects, or in a function that it called."""
    trace = error.__traceback__
    while trace is not None:
        instance = trace.tb_frame.f_locals.get("self")
        if instance is not None and any(instance is part for part in parts):
            return True
        trace = trace.tb_next
    return False


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: deepcopy(value) for key, value in group.items() if key not in ("params", "initial_lr")}
