"""Convert buffers of any dtype to values that can be subtracted, averaged and added."""

from __future__ import annotations

import torch
from torch import Tensor

_INTEGERS = (torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.int8, torch.int16, torch.int32)
_WIDE = {torch.float32, torch.float64, torch.int64, torch.complex64, torch.complex128}
_HALVES = (torch.float16, torch.bfloat16)


def addable(dtype: torch.dtype) -> bool:
    """Whether a dtype holds numbers; packed types do not."""
    try:
        narrow(wide(torch.zeros((), dtype=torch.uint8).to(dtype)), dtype)
    except (RuntimeError, NotImplementedError):
        return False
    return True


def numbers(tensor: Tensor) -> int:
    """Return how many real numbers a tensor's change has."""
    return tensor.numel() * (2 if tensor.is_complex() else 1)


def wide(tensor: Tensor) -> Tensor:
    """Return a tensor in a dtype that torch can add and subtract, and in which none of its changes is rounded away."""
    if tensor.dtype in _WIDE:
        return tensor
    if tensor.dtype in _INTEGERS:
        return tensor.to(torch.int64)
    if tensor.dtype == torch.uint64:
        return tensor.view(torch.int64)
    if tensor.dtype == torch.complex32:
        return tensor.to(torch.complex64)
    if tensor.dtype in _HALVES or (tensor.is_floating_point() and tensor.element_size() == 1):
        return tensor.to(torch.float32)
    return tensor


def narrow(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Undo :func:`wide`."""
    if values.dtype == dtype:
        return values
    if dtype == torch.bool:
        return values > 0
    return values.view(dtype) if dtype == torch.uint64 else values.to(dtype)


def base(values: Tensor) -> Tensor:
    """Return the origin for changes of wide values: zero where they are infinite or NaN (such as an initial minimum)."""
    return torch.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0) if values.is_floating_point() else values


def change(now: Tensor, start: Tensor) -> Tensor:
    """Return a buffer's change from a :func:`base`, flat; real and imaginary parts are separate numbers."""
    difference = wide(now.detach()) - start
    return (torch.view_as_real(difference) if difference.is_complex() else difference).flatten()


def advanced(start: Tensor, mean: Tensor) -> Tensor:
    """Return the wide values of a buffer after a flat mean change; rounded for integers."""
    values = wide(start)
    if values.is_complex():
        return values + torch.view_as_complex(mean.view(*start.shape, 2).to(values.real.dtype))
    moved = mean if values.is_floating_point() else mean.round()
    return base(values) + moved.view(start.shape).to(values.dtype)


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors are bitwise equal. Waits for the device."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    one, other = (tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (first, second))
    return torch.equal(one, other)
