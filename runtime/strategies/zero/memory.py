"""Predicted bytes of state per process under ZeRO, as implemented in DeepSpeed (0.19).

Rajbhandari et al. 2020, section 3, plus DeepSpeed's extra memory: in every stage the float32 master weights are a separate
copy, even if passes run in float32; in stage 3 parameters below a threshold stay whole on every process.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from runtime.strategies.state_size import StateBytes, optimizer_bytes

_FLOAT32, _HALF = 4, 2  # bytes
# In stages 1 and 2 a group's flat tensor is padded to a multiple of this times the world size, in elements.
_ALIGNMENT = 2
# DeepSpeed's own defaults, in elements
_BUCKET = 500_000_000
_PERSISTENT = 100_000
_LIVE = 1_000_000_000


def state_bytes_of_zero(
    json: Mapping[str, Any], module: nn.Module, optimizer: Optimizer, world_size: int
) -> StateBytes:
    """Return the state's size on the process that will hold most, for a module that was not prepared.

    Args:
        json: DeepSpeed's configuration, from :func:`runtime.config.zero_json.generate`.
    """
    zero = json["zero_optimization"]
    half = json["bf16"]["enabled"] or json["fp16"]["enabled"]
    parameters = list(module.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]

    def width(tensor: Tensor) -> int:
        return _HALF if half and tensor.is_floating_point() else tensor.element_size()

    def part(parameter: Tensor) -> int:
        return -(-parameter.numel() // world_size)

    persistent, live = _persistent(parameters, zero), 0
    of_gradient = _HALF if half else _FLOAT32
    whole = sum(parameter.numel() for parameter in trained)
    if zero["stage"] == 3:
        own = reduced = sum(map(part, trained))
        # Persistent parameters are held in addition to their parts, and padded to equal parts as when gathered.
        held = sum(width(p) * part(p) for p in parameters) + sum(width(p) * part(p) * world_size for p in persistent)
        rest = [p for p in parameters if not any(p is other for other in persistent)]
        allowed = zero.get("stage3_max_live_parameters", _LIVE) / max(1, sum(p.numel() for p in rest))
        live = round(min(1.0, allowed) * sum(width(p) * p.numel() for p in rest))
    else:
        groups = [group["params"] for group in optimizer.param_groups]
        own = sum(_aligned(group, world_size) for group in groups) // world_size
        per_rank = (_gradient_elements(groups, rank, world_size) for rank in range(world_size))
        reduced = whole if zero["stage"] == 1 else max(per_rank)
        frozen = sum(width(p) * p.numel() for p in parameters if not p.requires_grad)
        held = frozen + of_gradient * own * world_size
    bucket = of_gradient * min(zero.get("reduce_bucket_size", _BUCKET), whole)
    # Approximates this process's parts by an equal part of each parameter.
    state = optimizer_bytes(optimizer, lambda p: _FLOAT32 * p.numel() * own / whole)
    return StateBytes(
        held,
        of_gradient * reduced,
        None if state is None else _FLOAT32 * own + state,
        sum(buffer.nbytes for buffer in module.buffers()),
        max(bucket + live, _FLOAT32 * own),  # peak of a pass, or of the update with its float32 gradient
    )


def _persistent(parameters: list[nn.Parameter], zero: Mapping[str, Any]) -> list[nn.Parameter]:
    """Return the parameters that stage 3 keeps whole, chosen as DeepSpeed does."""
    max_parameter = zero.get("stage3_param_persistence_threshold", _PERSISTENT)
    max_total = zero.get("stage3_model_persistence_threshold", float("inf"))
    persistent: list[nn.Parameter] = []
    total = 0
    for parameter in parameters:
        if parameter.numel() <= max_parameter and parameter.numel() + total <= max_total:
            persistent.append(parameter)
            total += parameter.numel()
    return persistent


def _aligned(parameters: list[nn.Parameter], world_size: int) -> int:
    multiple = _ALIGNMENT * world_size
    return -(-sum(parameter.numel() for parameter in parameters) // multiple) * multiple


def _gradient_elements(groups: list[list[nn.Parameter]], rank: int, world_size: int) -> int:
    """Return the number of gradient elements that a rank keeps in stage 2: all of each parameter that its parts overlap."""
    elements = 0
    for group in groups:
        size, end = _aligned(group, world_size) // world_size, 0
        for parameter in group:
            start, end = end, end + parameter.numel()
            if start < (rank + 1) * size and end > rank * size:
                elements += parameter.numel()
    return elements
