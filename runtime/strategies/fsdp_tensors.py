"""FSDP2's tensors, sharded along their first dimension, and the whole tensors of a checkpoint: each made from the other.

FSDP2 cuts a tensor of n rows over s ranks into runs of ceil(n / s) rows, so that the last ranks may hold fewer, or none.
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
    """Return what this rank holds of a tensor; it shares its memory."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def box_of(tensor: DTensor) -> tuple[slice, ...]:
    """Return where this rank's part of a tensor lies in the whole."""
    dimension = _sharded_dimension(tensor)
    box = [slice(0, size) for size in tensor.shape]
    if dimension is not None:
        size, ranks = tensor.shape[0], tensor.device_mesh.size(dimension)
        length = -(-size // ranks)
        start = min(length * tensor.device_mesh.get_local_rank(dimension), size)
        box[0] = slice(start, min(start + length, size))
    return tuple(box)


def to_checkpoint(tensor: Tensor, values: Tensor | None = None) -> Tensor | Shard:
    """Return a tensor as a checkpoint takes it.

    Args:
        values: of the same place as what this rank holds of the tensor; default: those it holds.
    """
    values = local(tensor) if values is None else values
    if not isinstance(tensor, DTensor):
        return values
    mesh, dimension = tensor.device_mesh, _sharded_dimension(tensor)
    # Of ranks that hold the same (HSDP's replicas), the first saves.
    saves = all(mesh.get_local_rank(other) == 0 for other in range(mesh.ndim) if other != dimension)
    offsets = tuple(bounds.start for bounds in box_of(tensor))
    return Shard(tuple(tensor.shape), offsets, values.detach() if saves and values.numel() else None)


def from_checkpoint(like: Tensor, stored: StoredTensor) -> Tensor:
    """Return a stored tensor in the place, and with the cut, of another; whole where their shapes differ."""
    if not isinstance(like, DTensor) or tuple(like.shape) != tuple(stored.shape):
        return torch.as_tensor(in_memory(stored))
    part = stored[box_of(like)].to(local(like).device, copy=True)
    made: Tensor = DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return made


def state_to_checkpoint(state: Any) -> Any:
    """Return nested state with its sharded tensors as a checkpoint takes them."""
    if isinstance(state, DTensor):
        return to_checkpoint(state)
    if isinstance(state, Mapping):
        return {key: state_to_checkpoint(value) for key, value in state.items()}
    if isinstance(state, list):
        return [state_to_checkpoint(value) for value in state]
    return state


def optimizer_state_from_checkpoint(state: Mapping[str, Any], parameters: list[nn.Parameter]) -> dict[str, Any]:
    """Return a whole optimizer state with each parameter's tensors cut as the parameter is.

    Args:
        parameters: of the optimizer's groups, in their order.

    Raises:
        ValueError: a tensor has another shape than its parameter, so that nobody knows its cut.
    """
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    of_number = dict(zip(numbers, parameters, strict=True))

    def cut(number: int, key: str, value: Any) -> Any:
        parameter = of_number[number]
        if not is_stored(value) or not value.shape:
            return in_memory(value)
        if tuple(value.shape) != tuple(parameter.shape):
            raise ValueError(
                f"the optimizer's {key!r} is {tuple(value.shape)} for a parameter of {tuple(parameter.shape)}; only state in "
                "the shape of its parameter can be sharded"
            )
        return from_checkpoint(parameter, value)

    cut_state = {
        number: {key: cut(number, key, value) for key, value in of_parameter.items()}
        for number, of_parameter in state["state"].items()
    }
    return {"state": cut_state, "param_groups": in_memory(state["param_groups"])}


class FSDPWeights:
    """The part of each parameter that this rank holds."""

    def __init__(self, module: nn.Module) -> None:
        self._parameters = dict(module.named_parameters())

    def pieces(self) -> Mapping[str, Tensor]:
        """Return what is held of each parameter."""
        return {name: local(parameter) for name, parameter in self._parameters.items()}

    def to_checkpoint(self, name: str, piece: Tensor) -> Tensor | Shard:
        """Return a piece as this rank's shard."""
        return to_checkpoint(self._parameters[name], piece)

    def from_checkpoint(self, name: str, stored: StoredTensor) -> Tensor:
        """Read this rank's piece."""
        return local(from_checkpoint(self._parameters[name], stored))

    def written(self) -> None:
        """Do nothing: each forward pass gathers the parameters anew."""


def _sharded_dimension(tensor: DTensor) -> int | None:
    """Return the dimension of the mesh over which a tensor is cut; None if every rank holds all of it."""
    for dimension, placement in enumerate(tensor.placements):
        if isinstance(placement, ShardPlacement):
            assert placement.dim == 0
            return dimension
        assert placement.is_replicate()
    return None
