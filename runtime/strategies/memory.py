"""How many bytes of state each process holds, by the formula: before anything is taken, and to compare with what is measured.

Activations are not in it: they depend on the microbatch.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from runtime.config.strategy import Strategy
from runtime.optimization.combined import members
from runtime.strategies.blocks import blocks_of_classes, blocks_of_size


@dataclass(frozen=True)
class StateBytes:
    """Of the process that holds most.

    Args:
        parameters: held between steps.
        gradients: of what is trained, reduced.
        optimizer: state that is as large as the parameters, and weights of its own; None where it cannot be told.
        buffers: whole on every process.
        gathered: besides, for a while: the two largest blocks and their gradients, or with ``no_sync`` a whole gradient.
    """

    parameters: int
    gradients: int
    optimizer: int | None
    buffers: int
    gathered: int

    def __str__(self) -> str:
        optimizer = "unknown" if self.optimizer is None else in_units(self.optimizer)
        gathered = f"; gathered for a while: {in_units(self.gathered)}" if self.gathered else ""
        return (
            f"{in_units(self.parameters)} parameters, {in_units(self.gradients)} gradients, {in_units(self.buffers)} buffers, "
            f"{optimizer} optimizer, on each process{gathered}"
        )


def state_bytes(section: Strategy, module: nn.Module, optimizer: Optimizer, world_size: int) -> StateBytes:
    """Return what each of so many processes holds of a module that has not been prepared."""
    if section.kind == "zero":
        return _of_zero(section.zero.stage, module, optimizer, world_size)
    shards = max(1, world_size // section.fsdp.replicas) if section.kind == "fsdp" else 1

    def held(parameter: Tensor) -> int:
        rows = parameter.shape[0] if parameter.ndim else 1
        return parameter.nbytes // max(rows, 1) * -(-rows // shards)

    parameters = list(module.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    optimizer_bytes: int | None
    per_byte_of = cache(_state_per_byte)
    try:
        total = 0.0
        for member in members(optimizer):
            for number, group in enumerate(member.param_groups):
                for parameter in group["params"]:
                    per_byte = per_byte_of(member, number, parameter.dtype, parameter.ndim)
                    total += per_byte * held(parameter)
        optimizer_bytes = round(total)
    except Exception:  # an optimizer of the user's may want a closure, or more than one matrix
        optimizer_bytes = None
    return StateBytes(
        sum(map(held, parameters)),
        sum(map(held, trained)),
        optimizer_bytes,
        sum(buffer.nbytes for buffer in module.buffers()),
        _gathered(section, module, trained) if section.kind == "fsdp" and shards > 1 else 0,
    )


def _of_zero(stage: int, module: nn.Module, optimizer: Optimizer, world_size: int) -> StateBytes:
    """Return what a process holds in float32: with bf16 or fp16, half of the parameters and gradients.

    Rajbhandari et al. 2020, section 3; the weights that are updated are a copy of their own in every stage.
    """
    parts = {key: world_size if stage >= least else 1 for key, least in (("gradients", 2), ("parameters", 3))}
    trained = sum(parameter.nbytes for parameter in module.parameters() if parameter.requires_grad)
    optimizer_bytes: int | None
    per_byte_of = cache(_state_per_byte)
    try:
        groups = [(number, p) for number, group in enumerate(optimizer.param_groups) for p in group["params"]]
        state = sum(per_byte_of(optimizer, number, p.dtype, p.ndim) * p.nbytes for number, p in groups)
        optimizer_bytes = round(trained / world_size + state / world_size)
    except Exception:
        optimizer_bytes = None
    return StateBytes(
        sum(parameter.nbytes for parameter in module.parameters()) // parts["parameters"],
        trained // parts["gradients"],
        optimizer_bytes,
        sum(buffer.nbytes for buffer in module.buffers()),
        0,
    )


def in_units(count: float) -> str:
    """Return a number of bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def _gathered(section: Strategy, module: nn.Module, trained: list[nn.Parameter]) -> int:
    """Return what is whole at one time: the block at work, the next one, and what lies in no block; and their gradients."""
    fsdp = section.fsdp
    blocks = (
        blocks_of_size(module, fsdp.min_parameters)
        if fsdp.min_parameters is not None
        else blocks_of_classes(module, fsdp.wrap)
    )
    within = {id(parameter) for block in blocks for parameter in block.parameters()}
    rest = sum(parameter.nbytes for parameter in module.parameters() if id(parameter) not in within)
    sizes = sorted((sum(p.nbytes for p in block.parameters()) for block in blocks), reverse=True)
    parameters = rest + (sum(sizes[:2]) if fsdp.reshard_after_forward else sum(sizes))
    return parameters + (sum(p.nbytes for p in trained) if fsdp.no_sync else rest + sum(sizes[:1]))


def _state_per_byte(member: Optimizer, number: int, dtype: torch.dtype, ndim: int) -> float:
    """Return the state's size over the parameter's, found by a step of an optimizer like this one on a small parameter."""
    probe = nn.Parameter(torch.ones((2,) * ndim, dtype=dtype))
    known = set(inspect.signature(type(member)).parameters) - {"params", "fused", "foreach", "capturable"}
    group = {key: value for key, value in member.param_groups[number].items() if key in known}
    same = type(member)([probe], **group)
    probe.grad = torch.zeros_like(probe)
    same.step()
    shaped = [value for value in same.state[probe].values() if isinstance(value, Tensor) and value.shape == probe.shape]
    return sum(value.nbytes for value in shaped if value.ndim) / probe.nbytes
