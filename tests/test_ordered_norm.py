"""The norm of a gradient does not depend on which rank holds which rows, to the bit, and is right."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from runtime.strategies.ordered_norm import sums_by_halving, sums_of_squares

pytestmark = pytest.mark.single
SHAPES = st.lists(
    st.one_of(
        st.just(()),
        st.tuples(st.integers(1, 70)),
        st.tuples(st.integers(1, 40), st.integers(1, 300)),
        st.tuples(st.integers(1, 9), st.integers(1, 5), st.integers(1, 7)),
    ),
    min_size=1,
    max_size=4,
)
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.complex64])


def gradients_of(shapes: list[tuple[int, ...]], dtype: torch.dtype, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scales = [10.0 ** torch.randint(-8, 9, shape, generator=generator) for shape in shapes]
    return [(torch.randn(scale.shape, generator=generator, dtype=torch.float64) * scale).to(dtype) for scale in scales]


def on_ranks(gradients: list[Tensor], world_size: int) -> Tensor:
    """The sum over ranks that hold rows as FSDP2 shards them; a scalar is whole on each, so it is left to the first."""
    total: Tensor | None = None
    for rank in range(world_size):
        rows, parts = [], list[Tensor | None]()
        for gradient in gradients:
            size = len(gradient) if gradient.ndim else 1
            length = -(-size // world_size)
            held = slice(min(rank * length, size), min((rank + 1) * length, size))
            rows.append(held)
            whole = gradient if held.stop > held.start else None
            parts.append(gradient[held].clone() if gradient.ndim else whole)
        sums = sums_of_squares([gradient.shape for gradient in gradients], rows, parts)
        total = sums if total is None else total + sums
    assert total is not None
    return total


@given(shapes=SHAPES, dtype=DTYPES, seed=st.integers(0, 99), world_size=st.integers(2, 8))
@settings(max_examples=150, deadline=None)
def test_any_number_of_ranks_gives_the_same_bits(
    shapes: list[tuple[int, ...]], dtype: torch.dtype, seed: int, world_size: int
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as ``determinism: exact`` does
    try:
        gradients = gradients_of(shapes, dtype, seed)
        before = [gradient.clone() for gradient in gradients]
        alone = on_ranks(gradients, 1)
        assert torch.equal(alone, on_ranks(gradients, world_size))
        assert all(torch.equal(now, then) for now, then in zip(gradients, before, strict=True))
        exact = math.fsum(value * value for g in gradients for value in flat(g))
        assert alone.sum().item() == pytest.approx(exact, rel=1e-12)
    finally:
        torch.set_num_threads(threads)


def flat(gradient: Tensor) -> list[float]:
    real = torch.view_as_real(gradient) if gradient.is_complex() else gradient
    values: list[float] = real.double().reshape(-1).tolist()
    return values


@pytest.mark.parametrize("summed", [sums_by_halving, lambda rows: rows.sum(1)])
@pytest.mark.parametrize("columns", [1, 2, 3, 8, 17, 64, 100, 1023])
def test_rows_are_summed_alike_in_any_company(columns: int, summed: Callable[[Tensor], Tensor]) -> None:
    rows = torch.cat([flat_rows(columns, seed) for seed in range(2)])
    expected = summed(rows.clone())
    assert expected.tolist() == pytest.approx([math.fsum(row) for row in rows.tolist()], rel=1e-13)
    for cut in (1, 5, 12):
        parts = torch.cat([summed(rows[:cut].clone()), summed(rows[cut:].clone())])
        assert torch.equal(parts, expected)


def flat_rows(columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(12, columns, generator=generator, dtype=torch.float64)


def test_what_is_not_finite_shows() -> None:
    shapes = [torch.Size([3])]
    for value in (math.inf, -math.inf, math.nan):
        sums = sums_of_squares(shapes, [slice(0, 3)], [torch.tensor([1.0, value, 2.0])])
        assert not math.isfinite(sums.sum().item())
    assert sums_of_squares(shapes, [slice(0, 3)], [None]).tolist() == [0.0, 0.0, 0.0]
