"""A tensor that is summed over the slots of real processes is the same bits on any number of them."""

from __future__ import annotations

import operator
import os

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from runtime.data.batches import slots_of_rank
from runtime.distributed.slot_reduction import OrderedReduction
from runtime.distributed.slot_tree import Node, RunningSum
from tests.process_pool import ProcessPool


def of_slot(slot: int, size: int, dtype: torch.dtype) -> Tensor | None:
    """A slot's value, with a wide range of magnitudes; the fifth has none, nor has the only one of one-element tensors."""
    if slot == 4 or (slot == 0 and size == 1):
        return None
    generator = torch.Generator().manual_seed(slot)
    scale = 10.0 ** torch.randint(-6, 7, (size,), generator=generator)
    return (torch.randn(size, generator=generator, dtype=torch.float64) * scale).to(dtype)


def reduced(cases: list[tuple[int, int, torch.dtype]]) -> list[list[int]]:
    """The bytes of each sum as one process of a world gets it."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        dist.init_process_group("gloo")
    rank = dist.get_rank() if world_size > 1 else 0
    try:
        return [reduced_on(rank, world_size, *case) for case in cases]
    finally:
        if world_size > 1:
            dist.destroy_process_group()


def reduced_on(rank: int, world_size: int, slots: int, size: int, dtype: torch.dtype) -> list[int]:
    reduction = OrderedReduction([slots_of_rank(slots, world_size, r) for r in range(world_size)], rank=rank)
    running = RunningSum[Tensor](reduction.own_slots, operator.add)
    for slot in reduction.own_slots:
        if (value := of_slot(slot, size, dtype)) is not None:
            running.put(Node(0, slot), value)
    values = running.take()
    own = of_owner(reduction, [None if value is None else value.clone() for value in values], size, dtype)
    whole = reduction.sum(values, torch.empty(size, dtype=dtype))
    assert torch.equal(own.view(torch.uint8), _part(whole, rank, world_size).view(torch.uint8))
    result: list[int] = whole.view(torch.uint8).tolist()
    return result


def of_owner(reduction: OrderedReduction, values: list[Tensor | None], size: int, dtype: torch.dtype) -> Tensor:
    """What a rank that needs only its part of the sum gets, of values padded to equal parts."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    padded = -(-size // world_size) * world_size
    parts = [None if v is None else torch.cat([v, v.new_full((padded - size,), -0.0)]) for v in values]
    return reduction.sum_of_own_part(parts, torch.empty(padded, dtype=dtype))


def _part(whole: Tensor, rank: int, world_size: int) -> Tensor:
    length = -(-whole.numel() // world_size)
    padded = torch.cat([whole, whole.new_full((length * world_size - whole.numel(),), -0.0)])
    return padded[rank * length : (rank + 1) * length]


CASES = [
    (slots, size, dtype)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    for slots in (1, 2, 3, 4, 6, 8, 13)
    for size in (1, 37)
]


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_any_number_of_processes_gives_the_same_bits(pool: ProcessPool, world_size: int) -> None:
    (alone,) = pool.run(reduced, 1, CASES)
    assert len({tuple(each) for each in alone}) > len(CASES) // 2  # the cases are not all the same
    assert pool.run(reduced, world_size, CASES) == [alone] * world_size


def test_the_order_decides_about_these_values() -> None:
    values = [value for slot in range(13) if (value := of_slot(slot, 37, torch.float32)) is not None]
    assert not torch.equal(sum(values, torch.zeros(37)), sum(reversed(values), torch.zeros(37)))
