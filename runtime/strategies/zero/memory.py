"""How many bytes each process holds under ZeRO, as DeepSpeed keeps them (0.19).

Rajbhandari et al. 2020, section 3, with what the engine keeps besides: in every stage the float32 weights that are updated are
a copy of their own, also where passes run in float32; in stage 3 parameters below a threshold stay whole on every process.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from runtime.strategies.state_size import StateBytes, optimizer_bytes

_FLOAT32, _HALF = 4, 2  # bytes
# Below stage 3 a group's flat tensor is filled up to a multiple of so many elements for each process.
_ALIGNED_PARTS = 2
# DeepSpeed's own defaults, in elements
_BUCKET = 500_000_000
_PERSISTENT = 100_000
_LIVE = 1_000_000_000


def state_bytes_of_zero(
    json: Mapping[str, Any], module: nn.Module, optimizer: Optimizer, world_size: int
) -> StateBytes:
    """Return what each of so many processes holds of a module that has not been prepared.

    Args:
        json: DeepSpeed's, as :func:`runtime.config.zero_json.generate` makes it.
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
        # Those that stay whole do so besides their part, and as they are gathered: filled up to equal parts.
        held = sum(width(p) * part(p) for p in parameters) + sum(width(p) * part(p) * world_size for p in persistent)
        rest = [p for p in parameters if not any(p is other for other in persistent)]
        allowed = zero.get("stage3_max_live_parameters", _LIVE) / max(1, sum(p.numel() for p in rest))
        live = round(min(1.0, allowed) * sum(width(p) * p.numel() for p in rest))
    else:
        groups = [group["params"] for group in optimizer.param_groups]
        own = sum(_aligned(group, world_size) for group in groups) // world_size
        reduced = whole if zero["stage"] == 1 else max(_touched(groups, rank, world_size) for rank in range(world_size))
        frozen = sum(width(p) * p.numel() for p in parameters if not p.requires_grad)
        held = frozen + of_gradient * own * world_size
    bucket = of_gradient * min(zero.get("reduce_bucket_size", _BUCKET), whole)
    # This process's own parts, as if they were an equal part of each parameter.
    state = optimizer_bytes(optimizer, lambda p: _FLOAT32 * p.numel() * own / whole)
    return StateBytes(
        held,
        of_gradient * reduced,
        None if state is None else _FLOAT32 * own + state,
        sum(buffer.nbytes for buffer in module.buffers()),
        max(bucket + live, _FLOAT32 * own),  # a pass, or the update with its gradient in float32
    )


def _persistent(parameters: list[nn.Parameter], zero: Mapping[str, Any]) -> list[nn.Parameter]:
    """Return what stage 3 keeps whole, as DeepSpeed chooses it."""
    small = zero.get("stage3_param_persistence_threshold", _PERSISTENT)
    at_most = zero.get("stage3_model_persistence_threshold", float("inf"))
    kept: list[nn.Parameter] = []
    total = 0
    for parameter in parameters:
        if parameter.numel() <= small and parameter.numel() + total <= at_most:
            kept.append(parameter)
            total += parameter.numel()
    return kept


def _aligned(parameters: list[nn.Parameter], world_size: int) -> int:
    multiple = _ALIGNED_PARTS * world_size
    return -(-sum(parameter.numel() for parameter in parameters) // multiple) * multiple


def _touched(groups: list[list[nn.Parameter]], rank: int, world_size: int) -> int:
    """Return the elements of the gradients that a rank keeps in stage 2: all of each parameter that its parts touch."""
    found = 0
    for group in groups:
        size, end = _aligned(group, world_size) // world_size, 0
        for parameter in group:
            start, end = end, end + parameter.numel()
            if start < (rank + 1) * size and end > rank * size:
                found += parameter.numel()
    return found
