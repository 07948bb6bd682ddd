"""Copies of a module and its optimizer that can be tried out: nothing that is done to them is seen in the originals."""

from __future__ import annotations

from collections import OrderedDict
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from runtime import environment
from runtime.objective import TrainingModule

_HOOKS = ("_pre_hooks", "_post_hooks")
_ROOM = 3  # copies of the state: the running one's, the new one's, and what passes and updates need


def copy_of(module: TrainingModule, optimizer: Optimizer) -> tuple[TrainingModule, Optimizer]:
    """Copy a module with all its attributes, and an optimizer over the copy's parameters with all of its own."""
    memo: dict[int, Any] = {}
    for part in module.modules():
        for value in vars(part).values():
            _detach(value, memo)
    return deepcopy(module, memo), _copied(optimizer, memo)


def enough_memory(module: nn.Module, optimizer: Optimizer, device: torch.device) -> bool:
    """Tell whether module and optimizer can be held twice more on their device."""
    tensors = [*module.parameters(), *module.buffers()]
    tensors += [v for entry in optimizer.state.values() for v in entry.values() if isinstance(v, Tensor)]
    free = _free_bytes(device)
    return free is None or _ROOM * sum(tensor.nbytes for tensor in tensors) < free


def _detach(value: Any, memo: dict[int, Any]) -> None:
    """Prepare what torch does not copy: a tensor that a forward pass left with its graph."""
    if isinstance(value, Tensor) and not value.is_leaf:
        memo[id(value)] = value.detach().clone()
    elif isinstance(value, list | tuple):
        for inner in value:
            _detach(inner, memo)
    elif isinstance(value, dict):
        for inner in value.values():
            _detach(inner, memo)


def _copied(optimizer: Optimizer, memo: dict[int, Any]) -> Optimizer:
    """Torch's own copies of an optimizer leave out what is beside its state and its groups (2.13)."""
    copy: Any = object.__new__(type(optimizer))
    memo[id(optimizer)] = copy
    for name, value in vars(optimizer).items():
        if name.endswith(_HOOKS):
            vars(copy)[name] = OrderedDict()
        elif name == "members":
            copy.members = tuple(_copied(member, memo) for member in value)
        elif name != "step":  # which a schedule put there, for the original
            vars(copy)[name] = deepcopy(value, memo)
    made: Optimizer = copy
    return made


def _free_bytes(device: torch.device) -> float | None:
    """Return what this process may take of its device's memory; None where nobody tells."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = float(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    try:
        group = Path("/sys/fs/cgroup")
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        free = min(free, float(limit) - float(used))
    except (OSError, ValueError):  # no such group, or no limit
        pass
    return free / environment.local_world_size(1)
