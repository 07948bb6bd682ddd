"""Tensor strides as part of a run's state.

A convolution in ``channels_last`` and a transposed weight are dense but not contiguous. Kernels choose their order of
summation by strides, and fused optimizers walk raw memory, so a resumed run needs the strides of the interrupted one.
Files hold values in index order; the strides are stored separately.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Return whether strides place every element of a shape in memory exactly once, without gaps."""
    if len(shape) != len(strides):
        return False
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(strides, shape, strict=True) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def strides_to_keep(tensor: Tensor) -> list[int] | None:
    """Return the strides of a tensor that is dense and not contiguous; None for any other, which is stored contiguous."""
    if tensor.layout != torch.strided or tensor.is_contiguous() or not is_dense(tensor.shape, tensor.stride()):
        return None
    return list(tensor.stride())


def same_layout(first: Tensor, second: Tensor) -> bool:
    """Return whether two tensors of one shape have the same strides, ignoring dimensions of size 1."""
    return all(a == b for a, b, size in zip(first.stride(), second.stride(), first.shape, strict=True) if size != 1)


def laid_out(tensor: Tensor, strides: Sequence[int]) -> Tensor:
    """Return a copy of a tensor with these strides.

    Raises:
        ValueError: no dense tensor of its shape has these strides.
    """
    if not all(isinstance(stride, int) and stride >= 0 for stride in strides) or not is_dense(tensor.shape, strides):
        raise ValueError(f"{list(strides)} are not the strides of a dense tensor of shape {tuple(tensor.shape)}")
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
