"""A user's data that notes who reads what, and when."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

SECONDS = {"now": 0.0}
"""A clock for tests that goes on only while samples are read."""


class Clocked(Dataset[tuple[Tensor, Tensor]]):
    """Points that take some of the clock's time to read on one rank, and less on the others."""

    def __init__(self, size: int = 64, slow_on: int = 1, seconds: float = 100.0) -> None:
        self.size, self.slow_on, self.seconds = size, slow_on, seconds

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        slow = int(os.environ.get("RANK", "0")) == self.slow_on
        SECONDS["now"] += self.seconds if slow else 0.01 * self.seconds
        return torch.full((8,), index / self.size, dtype=torch.float64), torch.tensor(index % 3)


class ClockedStream(IterableDataset[tuple[Tensor, Tensor]]):
    """The same as a stream."""

    def __init__(self, size: int = 64, slow_on: int = 1) -> None:
        self.points = Clocked(size, slow_on)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self.points[index] for index in range(self.points.size))


class Late(Dataset[tuple[Tensor, Tensor]]):
    """Points of which one takes longer to read than anybody waits."""

    def __init__(self, size: int = 32, late: int = 7) -> None:
        self.size, self.late = size, late

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index == self.late:
            time.sleep(60)
        return torch.full((8,), index / self.size, dtype=torch.float64), torch.tensor(index % 3)


def note_worker(worker: int) -> None:
    """Write this loader worker's process id to the file that the environment names."""
    with Path(os.environ["TINY_WORKERS"]).open("a") as file:
        file.write(f"{os.getpid()}\n")
