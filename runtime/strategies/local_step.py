"""Steps an optimizer of sharded parameters on each rank's shards as plain tensors.

Torch's optimizers can step DTensors, but each operation costs far more than on a tensor, and some of their multi-tensor
operations have no rule for them (Rprop's, torch 2.13). For an optimizer that treats elements alike the shards are enough.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from runtime.optimization.combined import members
from runtime.strategies.fsdp_tensors import local, sharded_like


class LocalStep:
    """Called to step the optimizer.

    Args:
        optimizer: of sharded parameters. Between steps its groups and state hold sharded tensors, as usual.
        step: steps it.
    """

    def __init__(self, optimizer: Optimizer, step: Callable[[], Any]) -> None:
        self._members, self._step = members(optimizer), step

    def __call__(self) -> None:
        """Replace parameters, gradients and state by this rank's shards, step, and put the sharded ones back."""
        shards = [_Shards(member) for member in self._members]
        try:
            self._step()
        finally:
            for each in shards:
                each.put_back()


class _Shards:
    def __init__(self, member: Optimizer) -> None:
        self._member = member
        self._groups = [group["params"] for group in member.param_groups]
        self._sharded: dict[int, Tensor] = {}  # by the identity of the shard
        state = dict(member.state)
        member.state.clear()
        self._parameters = [[self._local_parameter(parameter) for parameter in group] for group in self._groups]
        for group, own, shards in zip(member.param_groups, self._groups, self._parameters, strict=True):
            group["params"] = shards
            for parameter, shard in zip(own, shards, strict=True):
                if parameter in state:
                    member.state[shard] = {key: self._local(value) for key, value in state[parameter].items()}

    def put_back(self) -> None:
        state = dict(self._member.state)
        self._member.state.clear()
        for group, own, shards in zip(self._member.param_groups, self._groups, self._parameters, strict=True):
            group["params"] = own
            for parameter, shard in zip(own, shards, strict=True):
                if shard in state:
                    entries = state[shard].items()
                    self._member.state[parameter] = {key: self._whole(value, parameter) for key, value in entries}

    def _local_parameter(self, parameter: nn.Parameter) -> nn.Parameter:
        shard = nn.Parameter(local(parameter).detach(), requires_grad=parameter.requires_grad)
        shard.grad = None if parameter.grad is None else local(parameter.grad)
        return shard

    def _local(self, value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        shard = local(value)
        self._sharded[id(shard)] = value
        return shard

    def _whole(self, value: Any, parameter: nn.Parameter) -> Any:
        if id(value) in self._sharded:
            return self._sharded[id(value)]
        if isinstance(value, Tensor) and value.ndim and value.shape == local(parameter).shape:
            return sharded_like(parameter, value)
        return value
