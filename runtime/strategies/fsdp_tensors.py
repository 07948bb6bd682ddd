"""Conversion between FSDP2's sharded tensors and a checkpoint's whole ones.

FSDP2 shards along the first dimension: of n rows over s ranks each rank holds ceil(n / s), the last ranks fewer or none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as ShardPlacement

from runtime.state.shards import Shard, StoredTensor, in_memory, is_stored


def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a tensor, sharing its memory."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def box_of(tensor: DTensor) -> tuple[slice, ...]:
    """Return the box of the whole tensor that this rank's shard covers."""
    dimension = _sharded_dimension(tensor)
    box = [slice(0, size) for size in tensor.shape]
    if dimension is not None:
        size, ranks = tensor.shape[0], tensor.device_mesh.size(dimension)
        length = -(-size // ranks)
        start = min(length * tensor.device_mesh.get_local_rank(dimension), size)
        box[0] = slice(start, min(start + length, size))
    return tuple(box)


def rows_of(tensor: Tensor) -> slice:
    """Return the rows, along the first dimension, that this rank holds of a sharded tensor."""
    assert isinstance(tensor, DTensor)
    return box_of(tensor)[0]


def to_checkpoint(tensor: Tensor, values: Tensor | None = None) -> Tensor | Shard:
    """Convert a tensor for a checkpoint: to this rank's ``Shard`` if it is sharded.

    Args:
        values: to save instead of this rank's shard, in its shape.
    """
    values = local(tensor) if values is None else values
    if not isinstance(tensor, DTensor):
        return values
    mesh, dimension = tensor.device_mesh, _sharded_dimension(tensor)
    # Of the ranks with the same shard (HSDP's replicas), the first saves it.
    saves = all(mesh.get_local_rank(other) == 0 for other in range(mesh.ndim) if other != dimension)
    offsets = tuple(bounds.start for bounds in box_of(tensor))
    return Shard(tuple(tensor.shape), offsets, values.detach() if saves and values.numel() else None)


def from_checkpoint(like: Tensor, stored: StoredTensor) -> Tensor:
    """Return a stored tensor sharded like ``like``, on its device; whole if ``like`` is not sharded or the shapes differ."""
    if not isinstance(like, DTensor) or tuple(like.shape) != tuple(stored.shape):
        return torch.as_tensor(in_memory(stored))
    return sharded_like(like, stored[box_of(like)].to(local(like).device, copy=True))


def sharded_like(like: Tensor, part: Tensor) -> Tensor:
    """Return the tensor, sharded like another one, of which this rank holds ``part``."""
    assert isinstance(like, DTensor)
    sharded: Tensor = DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return sharded


def state_to_checkpoint(state: Any) -> Any:
    """Return nested state with its sharded tensors converted for a checkpoint."""
    if isinstance(state, DTensor):
        return to_checkpoint(state)
    if isinstance(state, Mapping):
        return {key: state_to_checkpoint(value) for key, value in state.items()}
    if isinstance(state, list):
        return [state_to_checkpoint(value) for value in state]
    return state


def optimizer_state_from_checkpoint(state: Mapping[str, Any], parameters: list[nn.Parameter]) -> dict[str, Any]:
    """Return a whole optimizer state with each parameter's tensors sharded like the parameter.

    Args:
        parameters: of the optimizer's groups, in their order.

    Raises:
        ValueError: a tensor cannot be sharded because its shape differs from its parameter's.
    """
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    of_number = dict(zip(numbers, parameters, strict=True))

    def sharded(number: int, key: str, value: Any) -> Any:
        parameter = of_number[number]
        if not is_stored(value) or not value.shape:
            return in_memory(value)
        if tuple(value.shape) != tuple(parameter.shape):
            raise ValueError(
                f"the optimizer's {key!r} has shape {tuple(value.shape)} for a parameter of shape {tuple(parameter.shape)}; "
                "only state with the shape of its parameter can be sharded"
            )
        return from_checkpoint(parameter, value)

    sharded_state = {
        number: {key: sharded(number, key, value) for key, value in entry.items()}
        for number, entry in state["state"].items()
    }
    return {"state": sharded_state, "param_groups": in_memory(state["param_groups"])}


class FSDPWeights:
    """This rank's shards of a sharded module's parameters."""

    def __init__(self, module: nn.Module) -> None:
        self._parameters = dict(module.named_parameters())

    def pieces(self) -> Mapping[str, Tensor]:
        """Return this rank's shard of each parameter."""
        return {name: local(parameter) for name, parameter in self._parameters.items()}

    def to_checkpoint(self, name: str, piece: Tensor) -> Tensor | Shard:
        """Return a piece as this rank's shard."""
        return to_checkpoint(self._parameters[name], piece)

    def from_checkpoint(self, name: str, stored: StoredTensor) -> Tensor:
        """Read this rank's piece."""
        return local(from_checkpoint(self._parameters[name], stored))

    def refresh(self) -> None:
        """Do nothing: each forward pass gathers the parameters again."""


def _sharded_dimension(tensor: DTensor) -> int | None:
    """Return the mesh dimension over which a tensor is sharded; None if every rank holds all of it."""
    for dimension, placement in enumerate(tensor.placements):
        if isinstance(placement, ShardPlacement):
            assert placement.dim == 0
            return dimension
        assert placement.is_replicate()
    return None
