"""Predicted bytes of state per process, computed before anything is allocated.

Activations are not included: they depend on the microbatch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from runtime.config.strategy import StrategySection
from runtime.strategies.blocks import blocks_of_classes, blocks_of_size
from runtime.strategies.state_size import StateBytes, optimizer_bytes
from runtime.strategies.zero.memory import state_bytes_of_zero


def state_bytes(
    section: StrategySection,
    module: nn.Module,
    optimizer: Optimizer,
    world_size: int,
    *,
    zero_json: Callable[[], Mapping[str, Any]],
) -> StateBytes:
    """Return the state's size on the process that will hold most, for a module that was not prepared.

    Args:
        zero_json: returns the backend's JSON; called only for ``strategy.kind: zero``.
    """
    if section.kind == "zero":
        return state_bytes_of_zero(zero_json(), module, optimizer, world_size)
    shards = max(1, world_size // section.fsdp.replicas) if section.kind == "fsdp" else 1

    def held(parameter: Tensor) -> int:
        rows = parameter.shape[0] if parameter.ndim else 1
        return parameter.nbytes // max(rows, 1) * -(-rows // shards)

    parameters = list(module.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    return StateBytes(
        sum(map(held, parameters)),
        sum(map(held, trained)),
        optimizer_bytes(optimizer, held),
        sum(buffer.nbytes for buffer in module.buffers()),
        _gathered(section, module, trained) if section.kind == "fsdp" and shards > 1 else 0,
    )


def _gathered(section: StrategySection, module: nn.Module, trained: list[nn.Parameter]) -> int:
    """Return the peak bytes of gathered parameters (current block, next block, rest outside blocks) and their gradients."""
    fsdp = section.fsdp
    blocks = (
        blocks_of_size(module, fsdp.min_parameters)
        if fsdp.min_parameters is not None
        else blocks_of_classes(module, fsdp.wrap)
    )
    in_blocks = {id(parameter) for block in blocks for parameter in block.parameters()}
    rest = sum(parameter.nbytes for parameter in module.parameters() if id(parameter) not in in_blocks)
    sizes = sorted((sum(p.nbytes for p in block.parameters()) for block in blocks), reverse=True)
    parameters = rest + (sum(sizes[:2]) if fsdp.reshard_after_forward else sum(sizes))
    return parameters + (sum(p.nbytes for p in trained) if fsdp.no_sync else rest + sum(sizes[:1]))
