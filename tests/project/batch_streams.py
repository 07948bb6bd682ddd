"""A user's streams that yield whole batches, of ragged sizes; and models for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import IterableDataset, get_worker_info

SIZES = (5, 1, 9, 2, 14, 3, 3, 8, 1, 6, 4)  # of one epoch's batches; another order in each
VALIDATION = (4, 1, 7, 2, 2, 11, 3)


class Fixed(nn.Module):
    """Float64; begins with the same weights whatever the seed."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 3)).double()
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.arange(parameter.numel()).double().mul(0.7).cos().view_as(parameter))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)


class FixedBag(nn.Module):
    """Sums embeddings of all words of a sample: (words,) and (samples,) starts to (samples, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(13, 3, mode="sum").double()
        with torch.no_grad():
            self.bag.weight.copy_(torch.arange(39).double().mul(0.7).cos().view(13, 3))

    def forward(self, words: Tensor, starts: Tensor) -> Tensor:
        return self.bag(words, starts)


def ragged(sizes: tuple[int, ...], epoch: int) -> list[tuple[Tensor, Tensor]]:
    """Return an epoch's batches: (inputs, target)."""
    order = sorted(range(len(sizes)), key=lambda place: (place * 7 + 3 * epoch) % len(sizes))
    made = []
    for place in order:
        generator = torch.Generator().manual_seed(1000 * epoch + place)
        inputs = torch.randn(sizes[place], 8, generator=generator, dtype=torch.float64)
        made.append((inputs, (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0.3).long()))
    return made


class Ragged(IterableDataset[Any]):
    """Batches as tuples of tensors, or in another form."""

    def __init__(self, split: str = "train", form: str = "tuple") -> None:
        self.sizes, self.form, self.epoch = SIZES if split == "train" else VALIDATION, form, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        for inputs, target in ragged(self.sizes, self.epoch):
            if self.form == "arrays":
                yield {"inputs": inputs.numpy(), "target": target.numpy(), "split": "of no matter"}
            else:
                yield inputs, target


class Stateful(Ragged):
    """Goes on from where it was."""

    place = 0

    def __iter__(self) -> Iterator[Any]:
        place, self.place = self.place, 0
        for number, batch in enumerate(super().__iter__()):
            if number >= place:
                self.place = number + 1
                yield batch
        self.place = 0

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place = state["place"]


class Shares(Ragged):
    """Shares itself out over ranks and workers, whole batches to each."""

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        yield from list(super().__iter__())[rank * workers + worker :: ranks * workers]


class Packed(Ragged):
    """All words of a batch in one tensor, where each sample begins, and the samples' targets."""

    def __iter__(self) -> Iterator[Any]:
        for inputs, target in ragged(self.sizes, self.epoch):
            yield packed(inputs, target)


def packed(inputs: Tensor, target: Tensor) -> dict[str, Tensor]:
    lengths = [2 + number % 4 for number in range(len(target))]
    words = [number * 5 % 13 for number in range(sum(lengths))]
    starts = [sum(lengths[:number]) for number in range(len(target))]
    return {"words": torch.tensor(words), "starts": torch.tensor(starts), "target": target}


def noisy(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Add noise to a whole batch, under its own seed."""
    inputs, target = batch
    return inputs + 0.1 * torch.randn_like(inputs), target


class Unequal(IterableDataset[Any]):
    """Batches whose samples cannot be counted, or of none."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __iter__(self) -> Iterator[Any]:
        batches: dict[str, list[Any]] = {
            "shapes": [{"first": torch.zeros(3, 8), "second": torch.zeros(4)}],
            "texts": [{"text": "a b c"}],
            "empty": [
                (torch.zeros(2, 8).double(), torch.zeros(2).long()),
                (torch.zeros(0, 8).double(), torch.zeros(0)),
            ],
        }
        yield from batches[self.kind]
