"""Process group used by the writer threads of a sharded checkpoint.

A separate gloo group, since the training loop uses the default one at the same time.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from runtime.distributed.collectives import from_rank_0, gather_bytes

_CPU = torch.device("cpu")


class WriterGroup:
    """The ranks that write a checkpoint. Every method is collective among them.

    Args:
        rank: of this process.
        world_size: number of writers.
        timeout_seconds: longest wait for the others.
    """

    def __init__(self, *, rank: int = 0, world_size: int = 1, timeout_seconds: float = 1800.0) -> None:
        self.rank = rank
        self.world_size = world_size
        self._group: Any = None
        if world_size > 1:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))

    def broadcast(self, value: Any = None) -> Any:
        """Return rank 0's value, which must be JSON-serialisable."""
        return from_rank_0(value, _CPU, self._group) if self._group is not None else value

    def gather(self, payload: bytes) -> list[bytes]:
        """Return every rank's bytes, in rank order."""
        return gather_bytes(payload, _CPU, self._group) if self._group is not None else [payload]


SINGLE_WRITER = WriterGroup()
"""Only rank 0 writes."""
