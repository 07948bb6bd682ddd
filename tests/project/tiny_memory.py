"""A user's objective that needs more memory than there is for microbatches above a size."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from runtime.objective import Objective


class Hungry(Objective):
    """Runs out of memory above ``fits`` samples, on one rank only if one is given, truly or with a GPU's exception."""

    def __init__(self, fits: int, rank: int | None = None, truly: bool = False) -> None:
        super().__init__()
        self.fits, self.rank, self.truly = fits, rank, truly

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        if len(batch[1]) > self.fits and self.rank in (None, int(os.environ.get("RANK", "0"))):
            if self.truly:
                torch.empty(2**50)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore to read.")
        return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")
