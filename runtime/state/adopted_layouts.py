"""Giving a module's tensors the strides of a stored state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from runtime.state.memory_layout import is_dense, laid_out, same_layout


@torch.no_grad()
def adopt_layouts(part: nn.Module, stored: Mapping[str, Any]) -> bool:
    """Give parameters and buffers the strides of a state dict that was just loaded into them; return whether any changed.

    A model that converts itself in its first forward pass (``channels_last``) is built with other strides than saved.
    """
    changed = False
    for name, tensor in part.state_dict(keep_vars=True).items():
        value = stored.get(name)
        if not isinstance(tensor, Tensor) or not isinstance(value, Tensor) or tensor.shape != value.shape:
            continue
        if not same_layout(tensor, value) and is_dense(tensor.shape, tensor.stride()):
            tensor.data = laid_out(tensor.detach(), value.stride())
            changed = True
    return changed
