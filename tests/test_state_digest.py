"""The digest of a state tells any two states apart, and is the same however the state is shared out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.state.digest import TensorSum, digest_of, sum_of
from runtime.state.shards import Shard

pytestmark = pytest.mark.single
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.uint8, torch.complex64]


def whole(tensor: torch.Tensor) -> Shard:
    return Shard(tuple(tensor.shape), (0,) * tensor.ndim, tensor)


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.sampled_from(DTYPES),
    st.integers(0, 2),
    st.integers(0, 2**31),
    st.data(),
)
@settings(max_examples=200, deadline=None)
def test_parts_add_up_to_the_whole(
    shape: list[int], dtype: torch.dtype, axis: int, seed: int, data: st.DataObject
) -> None:
    torch.manual_seed(seed)
    tensor = (torch.randn(shape) * 100).to(dtype)
    axis %= len(shape)
    cut = data.draw(st.integers(0, shape[axis]))
    parts = []
    for start, length in ((0, cut), (cut, shape[axis] - cut)):
        offsets = tuple(start if number == axis else 0 for number in range(len(shape)))
        parts.append(Shard(tuple(shape), offsets, tensor.narrow(axis, start, length)))
    assert sum(map(sum_of, parts)) % 2**64 == sum_of(whole(tensor))


def test_large_tensors_are_cut_anywhere() -> None:
    tensor = torch.randn(300_001)
    for cut in (1, 65_535, 65_536, 65_537, 200_000, 300_000):
        first, second = Shard((300_001,), (0,), tensor[:cut]), Shard((300_001,), (cut,), tensor[cut:])
        assert (sum_of(first) + sum_of(second)) % 2**64 == sum_of(whole(tensor))


def test_one_bit_an_exchange_and_the_sign_of_zero_are_seen() -> None:
    torch.manual_seed(0)
    tensor = torch.randn(70_000)
    sums = {sum_of(whole(tensor))}
    for change in (lambda t: t.index_fill_(0, torch.tensor([69_999]), 0.0), lambda t: t.roll(1), lambda t: t.flip(0)):
        sums.add(sum_of(whole(change(tensor.clone()))))
    blocks = torch.randn(4, 65_536)
    assert sum_of(whole(blocks.flatten())) != sum_of(whole(blocks.roll(1, 0).flatten()))
    for bit in range(32):
        changed = tensor.clone()
        changed.view(torch.int32)[123] ^= torch.tensor(1 << bit if bit < 31 else -(2**31), dtype=torch.int32)
        sums.add(sum_of(whole(changed)))
    assert len(sums) == 36
    assert sum_of(whole(torch.tensor([0.0]))) != sum_of(whole(torch.tensor([-0.0])))


def test_memory_layout_does_not_count_but_names_shapes_and_types_do() -> None:
    tensor = torch.randn(2, 3, 4, 5)
    assert sum_of(whole(tensor)) == sum_of(whole(tensor.to(memory_format=torch.channels_last)))
    total = sum_of(whole(tensor))
    digests = {
        digest_of({"a": TensorSum("float32", (2, 60), total)}),
        digest_of({"a": TensorSum("float32", (60, 2), total)}),
        digest_of({"a": TensorSum("int32", (2, 60), total)}),
        digest_of({"b": TensorSum("float32", (2, 60), total)}),
    }
    assert len(digests) == 4


def test_a_scalar_and_an_empty_tensor_have_sums() -> None:
    assert sum_of(whole(torch.tensor(3.0))) != 0
    assert sum_of(whole(torch.empty(0, 3))) == 0
