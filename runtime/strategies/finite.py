"""What a gradient is judged by: whether it is finite, and its norm."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm


def all_finite(gradients: list[Tensor]) -> bool:
    """Tell whether no element is NaN or infinite. Waits for the device.

    A sum with such an element is not finite either, and on a CPU sums are the cheapest pass; sums of finite elements can
    overflow, so what they accuse is looked at element by element, as torch's GradScaler does (a multiplication by one, which
    changes no bit).
    """
    if gradients[0].device.type == "cpu" and math.isfinite(sum([gradient.sum().item() for gradient in gradients])):
        return True
    found = gradients[0].new_zeros(1)
    torch._amp_foreach_non_finite_check_and_unscale_(gradients, found, gradients[0].new_ones(1))
    return found.item() == 0


def norm_of(gradients: list[Tensor], *, uniform: bool) -> Tensor:
    """Return the 2-norm of a whole gradient.

    Args:
        uniform: all parts are of one type, on one device.
    """
    if not uniform:
        return get_total_norm(gradients)
    # What get_total_norm does, without grouping by device and type: half of its cost on small models.
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    return norm
