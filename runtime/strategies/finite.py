"""Whether a gradient is finite."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def all_finite(gradients: list[Tensor]) -> bool:
    """Tell whether no element is NaN or infinite. Waits for the device.

    A dot product with such an element is not finite either, and on a CPU NumPy's are the cheapest pass; those of finite
    elements can overflow, so what they accuse is looked at element by element, as torch's GradScaler does (a multiplication
    by one, which changes no bit).
    """
    if gradients[0].device.type == "cpu" and _finite_squares(gradients):
        return True
    found = gradients[0].new_zeros(1)
    torch._amp_foreach_non_finite_check_and_unscale_(gradients, found, gradients[0].new_ones(1))
    return found.item() == 0


def _finite_squares(gradients: list[Tensor]) -> bool:
    with np.errstate(over="ignore", invalid="ignore"):
        return all(math.isfinite(flat.dot(flat)) for flat in [g.detach().numpy().ravel(order="K") for g in gradients])
