"""How a tensor lies in memory: its strides, which belong to a run's state.

A convolution in ``channels_last`` and a transposed weight are dense, and not contiguous. Kernels choose their order of
summation by strides, and fused optimizers walk raw memory, so a resumed run needs the strides that the interrupted one had.
Files hold values in the order of their indices; the strides are beside them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Tell whether strides place every element of a shape in memory once, without gaps."""
    if len(shape) != len(strides):
        return False
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(strides, shape, strict=True) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def strides_to_keep(tensor: Tensor) -> list[int] | None:
    """Return the strides of a tensor that is dense and not contiguous; None of any other, which is kept contiguous."""
    if tensor.layout != torch.strided or tensor.is_contiguous() or not is_dense(tensor.shape, tensor.stride()):
        return None
    return list(tensor.stride())


def same_layout(first: Tensor, second: Tensor) -> bool:
    """Tell whether two tensors of one shape lie in memory alike; the stride of a dimension of size 1 says nothing."""
    return all(a == b for a, b, size in zip(first.stride(), second.stride(), first.shape, strict=True) if size != 1)


def laid_out(tensor: Tensor, strides: Sequence[int]) -> Tensor:
    """Return a tensor's values in memory of these strides.

    Raises:
        ValueError: they are not those of a dense tensor of its shape.
    """
    if not all(isinstance(stride, int) and stride >= 0 for stride in strides) or not is_dense(tensor.shape, strides):
        raise ValueError(f"{list(strides)} are not the strides of a dense tensor of shape {tuple(tensor.shape)}")
    made = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device)
    return made.copy_(tensor)
