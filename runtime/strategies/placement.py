"""Moving batches to a device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def to_device(batch: Any, device: torch.device) -> Any:
    """Return a batch with its tensors on a device; copies from pinned memory are asynchronous.

    For a CPU, returns the batch itself.
    """
    return batch if device.type == "cpu" else moved(batch, device)


def moved(batch: Any, device: torch.device) -> Any:
    """Return a batch with its nested tensors moved to a device."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: moved(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(moved(value, device) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(moved(value, device) for value in batch)
    return batch.to(device) if hasattr(batch, "to") else batch
