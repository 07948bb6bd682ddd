"""Whether a gradient is finite."""

from __future__ import annotations

import math

import torch
from torch import Tensor


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
