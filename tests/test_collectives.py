"""What ranks tell each other arrives whole, whatever its length."""

from __future__ import annotations

import pytest
import torch

from tests.process_pool import ProcessPool


def told(rank: int, length: int) -> bytes:
    return bytes((rank + place) % 251 for place in range(length))


def gather_all(cases: list[list[int]]) -> list[list[bytes]]:
    import torch.distributed as dist

    from runtime.config.strategy import DDPSection
    from runtime.distributed.collectives import gather_bytes
    from runtime.strategies.ddp import DDPStrategy

    strategy = DDPStrategy(precision="fp32", options=DDPSection())  # makes the group
    try:
        rank = dist.get_rank()
        return [gather_bytes(told(rank, lengths[rank]), torch.device("cpu")) for lengths in cases]
    finally:
        strategy.close()


@pytest.mark.parametrize("world_size", [2, 3])
def test_messages_of_any_length_arrive_whole_and_in_rank_order(pool: ProcessPool, world_size: int) -> None:
    sizes = [0, 1, 1015, 1016, 1017, 2040, 5000]
    cases = [[sizes[(number + turn) % len(sizes)] for turn in range(world_size)] for number in range(len(sizes))]
    cases += [[size] * world_size for size in sizes]
    expected = [[told(rank, length) for rank, length in enumerate(lengths)] for lengths in cases]
    assert pool.run(gather_all, world_size, cases) == [expected] * world_size


def sum_two_at_once() -> list[float]:
    import torch.distributed as dist

    from runtime.config.strategy import DDPSection
    from runtime.distributed.collectives import begin_sum_over_ranks
    from runtime.strategies.ddp import DDPStrategy

    strategy = DDPStrategy(precision="fp32", options=DDPSection())
    own = float(dist.get_rank() + 1)
    first = begin_sum_over_ranks(torch.tensor([own], dtype=torch.float64), torch.device("cpu"))
    second = begin_sum_over_ranks(torch.tensor([own * 10], dtype=torch.float64), torch.device("cpu"))
    told = [*second().tolist(), *first().tolist()]
    strategy.close()
    return told


def test_a_sum_that_was_begun_can_be_asked_for_later(pool: ProcessPool) -> None:
    assert pool.run(sum_two_at_once, 3) == [[60.0, 6.0]] * 3
