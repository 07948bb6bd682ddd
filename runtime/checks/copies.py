"""Independent copies of a module and its optimizer, for trial steps that do not affect the originals."""

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
_STATE_COPIES = 3  # the copy, the newly built one, and memory for passes and updates


def copy_of(module: TrainingModule, optimizer: Optimizer) -> tuple[TrainingModule, Optimizer]:
    """Copy a module and an optimizer with all their attributes; the optimizer's copy refers to the copied parameters."""
    memo: dict[int, Any] = {}
    for part in module.modules():
        for value in vars(part).values():
            _detach(value, memo)
    return deepcopy(module, memo), _copied(optimizer, memo)


def enough_memory(module: nn.Module, optimizer: Optimizer, device: torch.device) -> bool:
    """Whether the device has memory for two more copies of module and optimizer."""
    tensors = [*module.parameters(), *module.buffers()]
    tensors += [v for entry in optimizer.state.values() for v in entry.values() if isinstance(v, Tensor)]
    free = _free_bytes(device)
    return free is None or _STATE_COPIES * sum(tensor.nbytes for tensor in tensors) < free


def _detach(value: Any, memo: dict[int, Any]) -> None:
    """Add detached copies of non-leaf tensors, left by a forward pass, to the memo: torch refuses to deepcopy them."""
    if isinstance(value, Tensor) and not value.is_leaf:
        memo[id(value)] = value.detach().clone()
    elif isinstance(value, list | tuple):
        for inner in value:
            _detach(inner, memo)
    elif isinstance(value, dict):
        for inner in value.values():
            _detach(inner, memo)


def _copied(optimizer: Optimizer, memo: dict[int, Any]) -> Optimizer:
    """Copy an optimizer; torch's deepcopy (2.13) leaves out attributes other than its state and groups."""
    copy: Any = object.__new__(type(optimizer))
    memo[id(optimizer)] = copy
    for name, value in vars(optimizer).items():
        if name.endswith(_HOOKS):
            vars(copy)[name] = OrderedDict()
        elif name == "members":
            copy.members = tuple(_copied(member, memo) for member in value)
        elif name != "step":  # wrapped by a scheduler, bound to the original
            vars(copy)[name] = deepcopy(value, memo)
    result: Optimizer = copy
    return result


def _free_bytes(device: torch.device) -> float | None:
    """Return the free memory of the device for this process; None if unknown."""
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
