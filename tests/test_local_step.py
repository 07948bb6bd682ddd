"""A step on a rank's shards is the step of the whole parameters, and leaves groups and state sharded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from runtime.optimization.combined import CombinedOptimizer, members
from runtime.strategies.local_step import LocalStep
from tests.process_pool import ProcessPool


def start(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def build(kind: str, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    if kind == "combined":
        return CombinedOptimizer(
            [torch.optim.SGD(parameters[:1], lr=0.1, momentum=0.9), torch.optim.Adam(parameters[1:])]
        )
    cls: Any = getattr(torch.optim, kind)
    options = {"momentum": 0.9} if kind == "SGD" else {}
    return cls([{"params": parameters[:1], "lr": 0.05}, {"params": parameters[1:]}], foreach=True, **options)


def state_of(optimizer: torch.optim.Optimizer) -> dict[torch.Tensor, dict[str, Any]]:
    return {parameter: entry for member in members(optimizer) for parameter, entry in member.state.items()}


def stepped(kind: str) -> tuple[list[torch.Tensor], list[dict[str, Any]]]:
    """Three steps of sharded parameters, one of which gets its first gradient late; the whole values afterwards."""
    dist.init_process_group("gloo")
    try:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        parameters = [nn.Parameter(distribute_tensor(start(*shape), mesh, [Shard(0)])) for shape in SHAPES]
        optimizer = build(kind, parameters)
        step = LocalStep(optimizer, optimizer.step)
        wrappers: set[int] = set()
        for number in range(3):
            for parameter, shape in zip(parameters, SHAPES, strict=True):
                late = shape == SHAPES[-1] and number == 0
                parameter.grad = None if late else distribute_tensor(start(*shape) * (number + 1), mesh, [Shard(0)])
            step()
            held = [
                value
                for entry in state_of(optimizer).values()
                for value in entry.values()
                if isinstance(value, DTensor)
            ]
            assert number < 2 or {id(value) for value in held} == wrappers  # no new tensors where nothing was added
            wrappers = {id(value) for value in held}
        assert [p for group in optimizer.param_groups for p in group["params"]] == parameters
        assert set(state_of(optimizer)) == set(parameters)
        return [whole(parameter) for parameter in parameters], [
            {key: whole(value) for key, value in state_of(optimizer)[parameter].items()} for parameter in parameters
        ]
    finally:
        dist.destroy_process_group()


def whole(value: Any) -> Any:
    return value.full_tensor().detach() if isinstance(value, DTensor) else value


SHAPES = [(5, 3), (4,), (1, 7), (6, 2)]  # on two ranks one has no row of the third


@pytest.mark.parametrize("kind", ["SGD", "AdamW", "Rprop", "ASGD", "combined"])
def test_a_step_on_shards_is_the_step_of_the_whole(pool: ProcessPool, kind: str) -> None:
    parameters = [nn.Parameter(start(*shape)) for shape in SHAPES]
    optimizer = build(kind, parameters)
    for number in range(3):
        for parameter, shape in zip(parameters, SHAPES, strict=True):
            late = shape == SHAPES[-1] and number == 0
            parameter.grad = None if late else start(*shape) * (number + 1)
        optimizer.step()
    for found, states in pool.run(stepped, 2, kind):
        for parameter, value, state in zip(parameters, found, states, strict=True):
            assert torch.equal(value, parameter)
            for key, expected in state_of(optimizer)[parameter].items():
                assert torch.equal(torch.as_tensor(state[key]), torch.as_tensor(expected)), key
