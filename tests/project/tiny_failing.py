"""A user's data set that fails, or is slow, on one rank."""

from __future__ import annotations

import os
import time

import torch
from torch import Tensor
from torch.utils.data import Dataset


class Rows(Dataset[tuple[Tensor, Tensor]]):
    """Points whose seventh row cannot be read on one rank, and which another reads slowly."""

    def __init__(self, size: int = 64, fails_on: int | None = None, slow_on: int | None = None) -> None:
        self.size, self.fails_on, self.slow_on = size, fails_on, slow_on

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        rank = int(os.environ.get("RANK", "0"))
        if index % 64 == 7 and rank == self.fails_on:
            raise IndexError("row 7 is short")
        until = time.perf_counter() + (0.03 if rank == self.slow_on else 0.0)
        while time.perf_counter() < until:
            pass
        return torch.full((8,), index / self.size, dtype=torch.float64), torch.tensor(index % 3)
