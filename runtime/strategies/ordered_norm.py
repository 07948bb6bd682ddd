"""The norm of a gradient, the same bits whether its tensors are whole or sharded over any number of ranks by rows.

The squares of a row are added in an order that depends on the row's length alone, in float64; then all rows' sums, of all
parameters in their order. A rank that holds some rows contributes their sums and zeros for the others, so that the reduction
over ranks adds nothing but zeros.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def sums_of_squares(shapes: Sequence[torch.Size], rows: Sequence[slice], gradients: Sequence[Tensor | None]) -> Tensor:
    """Return the sum of squares of each row of each parameter, (rows of all parameters,) in float64, 0 for rows elsewhere.

    Args:
        shapes: of the whole parameters.
        rows: of each parameter that are held here, along the first dimension; a scalar has one.
        gradients: the rows held here; None counts as zero.
    """
    starts, total = list[int](), 0
    for shape in shapes:
        starts.append(total)
        total += shape[0] if shape else 1
    device = next((gradient.device for gradient in gradients if gradient is not None), None)
    sums = torch.zeros(total, dtype=torch.float64, device=device)
    for start, held, gradient in zip(starts, rows, gradients, strict=True):
        if gradient is not None and gradient.numel():
            sums[start + held.start : start + held.stop] = _squares(gradient)
    return sums


def _squares(gradient: Tensor) -> Tensor:
    number = len(gradient) if gradient.ndim else 1
    gradient = torch.view_as_real(gradient) if gradient.is_complex() else gradient
    squares = gradient.reshape(number, -1).to(torch.float64, copy=True).square_()
    # On one CPU thread the order within a row does not depend on how many rows there are (torch 2.11 to 2.13). On a GPU it
    # would: the kernel's launch depends on the whole shape.
    return squares.sum(1) if squares.device.type == "cpu" else sums_by_halving(squares)


def sums_by_halving(rows: Tensor) -> Tensor:
    """Return the sum of each row, in an order that no kernel decides: the second half is added to the first, and so on.

    Args:
        rows: (rows, columns); is overwritten.
    """
    while rows.shape[1] > 1:
        half, odd = divmod(rows.shape[1], 2)
        folded = rows[:, :half].add_(rows[:, half : 2 * half])
        if odd:
            folded[:, :1].add_(rows[:, -1:])
        rows = folded
    return rows[:, 0]
