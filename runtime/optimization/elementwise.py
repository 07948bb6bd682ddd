"""Tries whether an optimizer updates a part of a parameter as it updates the same part of the whole, bit for bit."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from runtime.config.component import described
from runtime.errors import ConfigurationError, Problem
from runtime.optimization.combined import members
from runtime.optimization.trial_steps import trial_copy, trial_step

_SHAPE, _STEPS = (72, 5), 4
_CUTS = tuple(
    range(0, 73, 3)
)  # parts shorter than a vector register, of which kernels treat the rest of a tensor apart


def refuse_coupled_rows(optimizer: Optimizer, device: torch.device) -> None:
    """Update a matrix as a whole and cut between rows, and compare.

    Optimizers with norms or factors of whole matrices differ, and so do torch's fused kernels on CPUs: they round the last
    few elements of a tensor in another way than the others (torch 2.13).

    Raises:
        ConfigurationError: they differ, or an update raised.
    """
    for member in members(optimizer):
        for group in member.param_groups:
            name = type(member).__name__
            try:
                whole = _updated(member, group, (0, _SHAPE[0]), device)
                cut = _updated(member, group, _CUTS, device)
            except Exception as error:
                raise _refused(f"{name} cannot be tried on a part of a matrix: it raised {described(error)}") from error
            if not torch.equal(whole, cut):
                fused = " with fused kernels" if group.get("fused") else ""
                raise _refused(
                    f"{name}{fused} updates a row of a matrix differently if other ranks hold its neighbours"
                    + ("; leave optimizer.args.fused out" if fused else "")
                )


def _updated(optimizer: Optimizer, group: dict[str, Any], cuts: tuple[int, ...], device: torch.device) -> Tensor:
    """Return a matrix after a few updates of its parts between the cuts."""
    generator = torch.Generator().manual_seed(0)
    start, *gradients = (torch.randn(_SHAPE, generator=generator) for _ in range(_STEPS + 1))
    parts = [slice(*ends) for ends in pairwise(cuts)]
    parameters = [nn.Parameter(start[part].to(device, copy=True)) for part in parts]
    options = {key: copy.deepcopy(value) for key, value in group.items() if key != "params"}
    if type(optimizer).__module__.startswith(
        "torch.optim."
    ):  # some create their state at once (Adagrad before torch 2.13)
        twin: Optimizer = type(optimizer)([{**options, "params": parameters}])  # type: ignore[call-arg]
    else:
        twin = trial_copy(optimizer, options, parameters)
    for gradient in gradients:
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = gradient[part].to(device, copy=True)
        trial_step(twin)
    return torch.cat([parameter.detach() for parameter in parameters]).cpu()


def _refused(what: str) -> ConfigurationError:
    advice = "determinism: exact needs strategy.kind: ddp for it; or use determinism: strict"
    return ConfigurationError([Problem("configuration", "optimizer.target", f"{what}: {advice}")])
