"""Result of a strategy's step: whether the update was applied, and the gradient's norm."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Update(NamedTuple):
    """Result of a step; equal on all ranks.

    Args:
        skipped: whether the parameters are unchanged; a :class:`DeviceFlag` if the device decides and the host reads it later.
        diverged_if_skipped: whether a skip means divergence: a non-finite gradient that is not part of a loss scale's search.
        grad_norm: 2-norm of the whole gradient before clipping, on the device; None if not measured.
    """

    skipped: bool | DeviceFlag
    diverged_if_skipped: bool = False
    grad_norm: Tensor | None = None


class DeviceFlag:
    """A flag on the device with an asynchronous copy to the host.

    The copy is queued after the kernels that set the flag. Reading it waits only for work queued before the copy, not for
    later forward and backward passes; a step later it has usually arrived.
    """

    def __init__(self, flag: Tensor) -> None:
        self.on_device = flag
        self._copied: torch.cuda.Event | None = None
        if flag.device.type == "cuda":
            self._on_host = torch.empty_like(flag, device="cpu", pin_memory=True)
            self._on_host.copy_(flag, non_blocking=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()
        else:
            self._on_host = flag

    def __bool__(self) -> bool:
        """Return the flag. Waits for its copy."""
        if self._copied is not None:
            self._copied.synchronize()
        return bool(self._on_host.item())
