"""A user's streams."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import IterableDataset, get_worker_info

from tests.project.tiny import points, rows, tokens


class Numbers(IterableDataset[int]):
    """0, 1, 2, … and in every epoch shuffled through a small buffer with Python's generator."""

    def __init__(self, size: int, *, buffer: int = 0) -> None:
        self.size, self.buffer, self.epoch = size, buffer, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        held: list[int] = []
        for number in range(self.size):
            held.append(number + 1000 * self.epoch)
            if len(held) > self.buffer:
                yield held.pop(random.randrange(len(held)))
        random.shuffle(held)
        yield from held


class Stateful(Numbers):
    """Goes on from where it was, without reading what lies before; counts what it has read."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.place, self.read = 0, 0

    def __iter__(self) -> Iterator[int]:
        place, self.place = self.place, 0
        for number in range(place, self.size):
            self.place = number + 1
            self.read += 1
            yield number + 1000 * self.epoch
        self.place = 0

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place = state["place"]


def reader() -> tuple[int, int, int]:
    """Which reader this is over all ranks and workers, of how many, and how many of them each rank has."""
    info = get_worker_info()
    worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return rank * workers + worker, ranks * workers, workers


class Shares(IterableDataset[int]):
    """Shares itself out over ranks and workers, unevenly: reader r of n has the numbers below size that are r modulo n."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Iterator[int]:
        own, readers, _ = reader()
        yield from range(own, self.size, readers)


class StatefulShares(Shares):
    """Goes on from where its reader was."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.place = 0

    def __iter__(self) -> Iterator[int]:
        place, self.place = self.place, 0
        for number, item in enumerate(super().__iter__()):
            if number >= place:
                self.place = number + 1
                yield item
        self.place = 0

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place = state["place"]


class Points(IterableDataset[Any]):
    """The samples of ``points`` in an order that changes with the epoch."""

    def __init__(self, size: int = 90, split: str = "train") -> None:
        self.samples = points(split, size=size)

    def __iter__(self) -> Iterator[Any]:
        order = torch.randperm(len(self.samples)).tolist()
        for place in order:
            yield self.samples[place]


class StatefulPoints(Points):
    def __init__(self, size: int = 90) -> None:
        super().__init__(size)
        self.place = 0

    def __iter__(self) -> Iterator[Any]:
        place, self.place = self.place, 0
        for number in range(place, len(self.samples)):
            self.place = number + 1
            yield self.samples[number]
        self.place = 0

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place = state["place"]


class Sliced(Points):
    """Shares itself out though the runtime was to do it."""

    def __iter__(self) -> Iterator[Any]:
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        for place in range(rank, len(self.samples), ranks):
            yield self.samples[place]


class Raising(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from rows(points(size=20))
        raise OSError("the shard is gone")


class Empty(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(())


def jitter(sample: Any) -> Any:
    """Add noise under the sample's own seed."""
    return (sample[0] + 0.1 * torch.randn(8, dtype=torch.float64), sample[1])


class SharedPoints(Points):
    """Shares itself out over ranks and workers."""

    def __iter__(self) -> Iterator[Any]:
        for place in Shares(len(self.samples)):
            yield self.samples[place]


class Tokens(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from rows(tokens())


class SharesOverWorkers(Points):
    """Asks torch which loader worker it is and shares itself out, as Hugging Face's streams do."""

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        for place in range(worker, len(self.samples), workers):
            yield self.samples[place]


class SeededByWorker(Points):
    """Draws its order with the seed of its loader worker."""

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        generator = torch.Generator().manual_seed(0 if info is None else info.seed)
        for place in torch.randperm(len(self.samples), generator=generator).tolist():
            yield self.samples[place]


def times_worker(sample: Any) -> Any:
    """Ask where it runs, in a transform."""
    info = get_worker_info()
    return (sample[0] * (1 if info is None else 2 + info.id), sample[1])


class Shuffled(StatefulPoints):
    """Goes on from its place in the data, and has lost what its shuffle buffer held, as Hugging Face's does."""

    def __init__(self, size: int = 90, buffer: int = 16) -> None:
        super().__init__(size)
        self.buffer = buffer

    def __iter__(self) -> Iterator[Any]:
        generator = random.Random(0)
        held: list[Any] = []
        for sample in super().__iter__():
            held.append(sample)
            if len(held) > self.buffer:
                yield held.pop(generator.randrange(len(held)))
        generator.shuffle(held)
        yield from held


class LiveState(StatefulPoints):
    """Hands out its own state, which it goes on to change."""

    def __init__(self, size: int = 90) -> None:
        super().__init__(size)
        self.state = {"place": 0}

    def __iter__(self) -> Iterator[Any]:
        place, self.state["place"] = self.state["place"], 0
        for number in range(place, len(self.samples)):
            self.state["place"] = number + 1
            yield self.samples[number]
        self.state["place"] = 0

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = dict(state)


class OwnGenerator(Points):
    """Shuffles with a generator of its own, which no seed reaches."""

    def __init__(self, size: int = 90) -> None:
        super().__init__(size)
        self.generator = random.Random()

    def __iter__(self) -> Iterator[Any]:
        yield from self.generator.sample(rows(self.samples), len(self.samples))


class Unseeded(Points):
    """Shuffles with a generator of the system's entropy, another one in each process."""

    def __iter__(self) -> Iterator[Any]:
        yield from random.Random().sample(rows(self.samples), len(self.samples))


class OwnIterator(Points):
    """Is its own iterator, which can be read once."""

    place = 0

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self.place == len(self.samples):
            raise StopIteration
        self.place += 1
        return self.samples[self.place - 1]


class CountsEpochs(Points):
    """Shuffles by its own count of how often it was read."""

    epoch = 0

    def __iter__(self) -> Iterator[Any]:
        self.epoch += 1
        yield from random.Random(self.epoch).sample(rows(self.samples), len(self.samples))


class ToldEpochs(CountsEpochs):
    """Shuffles by the epoch that it is told."""

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


class KeepsGenerator(StatefulPoints):
    """Shuffles with a generator of its own, which is part of its state."""

    def __init__(self, size: int = 90) -> None:
        super().__init__(size)
        self.generator = random.Random(3)

    def __iter__(self) -> Iterator[Any]:
        place, self.place = self.place, 0
        before = self.generator.getstate()
        order = self.generator.sample(range(len(self.samples)), len(self.samples))
        after = self.generator.getstate()
        for number in range(place, len(self.samples)):
            self.place = number + 1
            self.generator.setstate(before)
            yield self.samples[order[number]]
        self.place = 0
        self.generator.setstate(after)

    def state_dict(self) -> dict[str, Any]:
        version, numbers, gauss = self.generator.getstate()
        return {"place": self.place, "generator": [version, list(numbers), gauss]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place = state["place"]
        version, numbers, gauss = state["generator"]
        self.generator.setstate((version, tuple(numbers), gauss))


class StateOfTensors(StatefulPoints):
    """Its state is what JSON cannot hold."""

    def state_dict(self) -> dict[str, Any]:
        return {"place": torch.tensor(self.place)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place = int(state["place"])


class ShorterOnSome(Points):
    """The same samples on every rank, and fewer of them on each but the first."""

    def __iter__(self) -> Iterator[Any]:
        rank = dist.get_rank() if dist.is_initialized() else 0
        yield from (self.samples[place] for place in range(len(self.samples) - 20 * rank))


class Refilled(IterableDataset[Any]):
    """Numbers in a few buffers that are filled again and again."""

    def __init__(self, size: int, buffers: int, kind: str = "tensor") -> None:
        self.size, self.buffers, self.kind = size, buffers, kind

    def __iter__(self) -> Iterator[Any]:
        made: Callable[[], Any] = {"tensor": lambda: torch.zeros(1), "array": lambda: np.zeros(1), "dict": dict}[
            self.kind
        ]
        held = [made() for _ in range(self.buffers)]
        for number in range(self.size):
            buffer = held[number % self.buffers]
            if isinstance(buffer, dict):
                buffer["number"] = number
            else:
                buffer[0] = number
            yield buffer


class UnevenShares(IterableDataset[int]):
    """Each reader has more of the numbers than the one before, and the first of several workers has nothing."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Iterator[int]:
        own, readers, workers = reader()
        shares = [0 if workers > 1 and r % workers == 0 else (r + 1) ** 2 for r in range(readers)]
        ends = [self.size * sum(shares[:n]) // sum(shares) for n in range(len(shares) + 1)]
        yield from range(ends[own], ends[own + 1])


class Written(Points):
    """Reads its samples from a file of numbers, one of which is added to the inputs."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def __iter__(self) -> Iterator[Any]:
        with Path(self.path).open() as file:
            for line, (inputs, target) in zip(file, rows(self.samples), strict=False):
                yield inputs + float(line), target
