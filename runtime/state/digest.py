"""A digest of a state's tensors that does not depend on which rank holds which part of them.

The elements' bits, each times a weight that depends on its place, are summed modulo 2**64: multilinear hashing (Carter and
Wegman 1979). The ranks' sums add up to the whole tensor's, so equal states have equal digests under any strategy.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from runtime.randomness import mix
from runtime.state.shards import Shard

_BLOCK = 1 << 16  # elements that share a factor; the weights within a block are the same in each
_MANY = 16 * _BLOCK  # elements that are converted at a time
_STATE = ("objective", "buffers", "weights", "optimizer", "averaging")
_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.uint64}


class TensorSum(NamedTuple):
    """Of one tensor.

    Args:
        dtype: its name.
        shape: of the whole tensor.
        sum: over the elements that were summed so far.
    """

    dtype: str
    shape: tuple[int, ...]
    sum: int


def sum_of(shard: Shard) -> int:
    """Return the sum over the elements of a part of a tensor, modulo 2**64."""
    part = shard.part
    if part is None or not part.numel():
        return 0
    words = _words(part)
    per_element = len(words) // part.numel()
    run = _contiguous_run(shard)  # elements of the part that are neighbours in the whole tensor
    total = 0
    for number, start in enumerate(_run_starts(shard, run)):
        values = words[number * run * per_element : (number + 1) * run * per_element]
        total += _sum_of_run(values, start * per_element)
    return total % 2**64


def is_state(name: str) -> bool:
    """Return whether a checkpoint's tensor belongs to the state that decides how training goes on; figures do not."""
    return name.startswith(("model/", *(f"training/{part}/" for part in _STATE)))


def digest_of(sums: Mapping[str, TensorSum]) -> str:
    """Return the digest of tensors by name: 16 hexadecimal digits."""
    lines: list[Any] = [[name, each.dtype, list(each.shape), each.sum] for name, each in sorted(sums.items())]
    return hashlib.sha256(json.dumps(lines).encode()).hexdigest()[:16]


def _words(part: Tensor) -> npt.NDArray[Any]:
    data = part.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return data.view(_WORDS[part.element_size()])


def _contiguous_run(shard: Shard) -> int:
    assert shard.part is not None
    run, shape = 1, shard.part.shape
    for size, whole in zip(reversed(shape), reversed(shard.shape), strict=True):
        run *= size
        if size != whole:
            break
    return run


def _run_starts(shard: Shard, run: int) -> list[int]:
    """Return the place in the whole tensor, flat, of each run of a part."""
    assert shard.part is not None
    shape, whole = tuple(shard.part.shape), tuple(shard.shape)
    strides = [math.prod(whole[axis + 1 :]) for axis in range(len(whole))]
    leading = len(shape)
    while leading and math.prod(shape[leading - 1 :]) <= run:
        leading -= 1
    first = sum(offset * stride for offset, stride in zip(shard.offsets, strides, strict=True))
    return [
        first + sum(index * stride for index, stride in zip(indices, strides, strict=False))
        for indices in product(*(range(size) for size in shape[:leading]))
    ]


def _sum_of_run(words: npt.NDArray[Any], start: int) -> int:
    """Return the weighted sum of neighbours, the first of which is at ``start``."""
    total, place = 0, 0
    until_block = -start % _BLOCK
    if until_block:
        head = words[:until_block]
        total += _factors(start // _BLOCK, 1)[0] * int(
            np.dot(head.astype(np.uint64), _WEIGHTS[start % _BLOCK :][: len(head)])
        )
        place = len(head)
    while place < len(words):
        many = words[place : place + _MANY]
        blocks = len(many) // _BLOCK
        block = (start + place) // _BLOCK
        if blocks:
            many = many[: blocks * _BLOCK]
            sums = np.dot(many.reshape(blocks, _BLOCK).astype(np.uint64), _WEIGHTS)
            factors = _factors(block, blocks)
            total += sum(factor * int(each) for factor, each in zip(factors, sums, strict=True))
        else:
            total += _factors(block, 1)[0] * int(np.dot(many.astype(np.uint64), _WEIGHTS[: len(many)]))
        place += len(many)
    return total


def _factors(first: int, count: int) -> list[int]:
    factors: list[int] = (_random(first, count) | np.uint64(1)).tolist()
    return factors


def _random(first: int, count: int) -> npt.NDArray[np.uint64]:
    return mix((np.arange(first, first + count, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))


_WEIGHTS = mix(_random(0, _BLOCK) ^ np.uint64(0xD1B54A32D192ED03))
