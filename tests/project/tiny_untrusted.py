"""A user's data sets, transforms, collate functions and samplers that are not what they seem, and their mended twins."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import Dataset, RandomSampler, Sampler, default_collate

from runtime.objective import Objective
from tests.project.tiny import points, rows


class Plain(Dataset[Any]):
    """The samples of ``points`` with a little noise, drawn as ``draws`` says."""

    def __init__(self, size: int = 96, draws: str = "seeded", split: str = "train") -> None:
        self.samples = points(split, size=size)
        self.own = np.random.default_rng(0)
        self.generator = torch.Generator().manual_seed(0)
        self.draws = draws

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        inputs, target = self.samples[index]
        noise = {
            "seeded": lambda: float(np.random.default_rng(np.random.randint(2**31)).random()),
            "numpy": lambda: float(self.own.random()),
            "torch": lambda: float(torch.rand((), generator=self.generator)),
            "system": lambda: os.urandom(1)[0] / 256,
            "none": lambda: 0.0,
        }[self.draws]()
        return inputs + 0.01 * noise, target


class Deterministic(Plain):
    """Says that it draws nothing."""

    deterministic = True


class DrawsThough(Dataset[Any]):
    """Says that it draws nothing, and draws from a global generator."""

    deterministic = True

    def __init__(self) -> None:
        self.samples = points()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        inputs, target = self.samples[index]
        return inputs + 0.01 * float(torch.rand(())), target


class Seeded(Dataset[Any]):
    """Is given seeds; heeds them or not."""

    seeded = True

    def __init__(self, heeds: bool = True) -> None:
        self.samples, self.heeds, self.own = points(), heeds, np.random.default_rng(0)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        raise AssertionError

    def __getitems__(self, ids: list[int], seeds: Any) -> list[Any]:
        drawn = [np.random.default_rng(seed) if self.heeds else self.own for seed in seeds]
        return [
            (self.samples[i][0] + 0.01 * float(own.random()), self.samples[i][1])
            for i, own in zip(ids, drawn, strict=True)
        ]


class Jitter:
    """A transform with a generator of its own, as Albumentations 2 has; seeded for each sample or not."""

    def __init__(self, own: bool = True) -> None:
        self.own, self.generator = own, np.random.default_rng(1)

    def __call__(self, sample: Any) -> Any:
        generator = self.generator if self.own else np.random.default_rng(np.random.randint(2**31))
        return (sample[0] + 0.01 * float(generator.random()), sample[1])


class InPlace:
    """Changes the sample that it is given, which a data set in memory holds."""

    def __call__(self, sample: Any) -> Any:
        sample[0].mul_(0.5)
        return sample


def identity(sample: Any) -> Any:
    return sample


class Dictionaries(Dataset[Any]):
    """Hands out the dictionaries and arrays that it holds, or copies of them."""

    def __init__(self, fresh: bool = False) -> None:
        self.held: list[dict[str, Any]] = [
            {"inputs": inputs.numpy().copy(), "target": int(target)} for inputs, target in rows(points())
        ]
        self.fresh = fresh

    def __len__(self) -> int:
        return len(self.held)

    def __getitem__(self, index: int) -> Any:
        held = self.held[index]
        return {**held, "inputs": held["inputs"].copy()} if self.fresh else held


class ScaledInPlace:
    def __call__(self, sample: Any) -> Any:
        sample["inputs"] *= 0.5
        return sample


class Replaced:
    """Changes a dictionary that is made for each sample."""

    def __call__(self, sample: Any) -> Any:
        sample["inputs"] = sample["inputs"] * 0.5
        return sample


class OneBuffer(Dataset[Any]):
    """Returns one and the same tensor, filled anew."""

    def __init__(self) -> None:
        self.samples = points()
        self.buffer = torch.zeros(8, dtype=torch.float64)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        inputs, target = self.samples[index]
        return self.buffer.copy_(inputs), target


class NoisyCollate:
    def __init__(self, own: bool = True) -> None:
        self.own, self.generator = own, torch.Generator().manual_seed(3)

    def __call__(self, samples: list[Any]) -> Any:
        inputs, target = default_collate(samples)
        return inputs + 0.01 * torch.rand(inputs.shape, generator=self.generator if self.own else None), target


class ByRank(Sampler[int]):
    """Shares out by rank, and looks like no sampler of torch's."""

    def __init__(self, source: Any) -> None:
        self.size = len(source)

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        yield from range(rank, self.size, ranks)


class FromSystem(Sampler[int]):
    """Draws from the system's randomness."""

    def __init__(self, source: Any) -> None:
        self.size = len(source)

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        return iter(np.random.default_rng().permutation(self.size).tolist())


class Counting(Sampler[int]):
    """Shuffles by a count of its own of the epochs it has drawn."""

    def __init__(self, source: Any) -> None:
        self.size, self.epoch = len(source), 0

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        self.epoch += 1
        return iter(np.random.default_rng(self.epoch).permutation(self.size).tolist())


class OwnBatches:
    """A batch sampler over a sampler that shares itself out, or has a generator of its own."""

    def __init__(self, source: Any, kind: str) -> None:
        if kind == "shares":
            self.sampler: Any = torch.utils.data.DistributedSampler(source, num_replicas=2, rank=0)
        else:
            self.sampler = RandomSampler(source, generator=torch.Generator())

    def __iter__(self) -> Iterator[list[int]]:
        drawn = list(self.sampler)
        yield from (drawn[start : start + 16] for start in range(0, len(drawn), 16))


class OrderOfFile(Counting):
    """Shuffles by what a file says, as another one may by the time or the order of a set."""

    def __init__(self, source: Any, path: str) -> None:
        super().__init__(source)
        self.path = path

    def __iter__(self) -> Iterator[int]:
        return iter(np.random.default_rng(int(Path(self.path).read_text())).permutation(self.size).tolist())


class DrawsNothing(Counting):
    def __iter__(self) -> Iterator[int]:
        return iter(())


class LaterByRank(Sampler[int]):
    """Draws alike in the first epoch, and later otherwise on each rank."""

    def __init__(self, source: Any) -> None:
        self.size, self.epoch = len(source), 0

    def __len__(self) -> int:
        return self.size

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        rank = dist.get_rank() if dist.is_initialized() and self.epoch else 0
        return iter(np.random.default_rng(rank).permutation(self.size).tolist())


class Listed(Dataset[Any]):
    """The lines of a file; another file on each host, or one whose lines come in another order."""

    def __init__(self, folder: str, split: str = "train") -> None:
        rank = dist.get_rank() if dist.is_initialized() else 0
        path = Path(folder) / f"{split}-{rank}.txt"
        self.numbers = [float(n) for n in (path if path.exists() else Path(folder) / "train.txt").read_text().split()]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Any:
        return torch.full((8,), self.numbers[index], dtype=torch.float64), index % 3


def weights_of_rank(source: Any) -> Any:
    """Compute weights that differ between ranks."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    return np.arange(len(source)) + 1 + rank


def weights_of_file(source: Any) -> Any:
    """Compute weights that a file says."""
    return np.arange(len(source)) + float(Path(os.environ["LOCKSTEP_TEST_WEIGHTS"]).read_text())


def dropping(samples: list[Any]) -> Any:
    """Collate, and leave out every third sample as one that cannot be used."""
    kept = [sample for place, sample in enumerate(samples) if place % 3]
    return default_collate(kept)


def two_views(samples: list[Any]) -> Any:
    return default_collate([view for sample in samples for view in (sample, sample)])


def time_first(samples: list[Any]) -> Any:
    """Have time in the first dimension, as many recurrent models do; one row a sample in the second."""
    inputs, target = default_collate(samples)
    return inputs.T.contiguous(), target.expand(8, -1)


def by_size(samples: list[Any]) -> Any:
    """Collate, the samples of the largest first input first, as recurrent models want the longest."""
    first = samples[0]
    key = (lambda sample: -sample["x"][0]) if isinstance(first, dict) else (lambda sample: -sample[0])
    return default_collate(sorted(samples, key=key))


def plain(samples: list[Any]) -> Any:
    return default_collate(samples)


class CountsSamples(Objective):
    """One loss a row, and the default weight."""

    def forward(self, model: Any, batch: Any) -> Any:
        return torch.nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")


class CountsRows(CountsSamples):
    def weight(self, batch: Any) -> float:
        return float(len(batch[1]))


class TimeFirst(Objective):
    def forward(self, model: Any, batch: Any) -> Any:
        return torch.nn.functional.cross_entropy(model(batch[0].T), batch[1][0], reduction="sum")
