"""Checking gradients for non-finite values, their norm, and clipping by it."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm


def all_finite(gradients: list[Tensor]) -> bool:
    """Return whether no element is NaN or infinite. Waits for the device.

    A non-finite element makes the sum non-finite, and on a CPU sums are the cheapest check; sums of finite elements can
    overflow, so a non-finite sum is followed by torch's GradScaler check of every element (which multiplies by one, and
    changes no bit).
    """
    if gradients[0].device.type == "cpu" and math.isfinite(sum([gradient.sum().item() for gradient in gradients])):
        return True
    found_inf = gradients[0].new_zeros(1)
    torch._amp_foreach_non_finite_check_and_unscale_(gradients, found_inf, gradients[0].new_ones(1))
    return found_inf.item() == 0


def norm_of(gradients: list[Tensor], *, uniform: bool) -> Tensor:
    """Return the 2-norm over all gradients together.

    Args:
        uniform: all gradients have one dtype and device.
    """
    if not uniform:
        return get_total_norm(gradients)
    # get_total_norm without its grouping by device and dtype, which is half of its cost on small models.
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    return norm


def clip_to_norm(gradients: list[Tensor], max_grad_norm: float, grad_norm: Tensor) -> None:
    """Scale gradients in place like torch's ``clip_grads_with_norm_``, which takes no shards with the norm of the whole."""
    factor = (max_grad_norm / (grad_norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(factor.to(gradient))
