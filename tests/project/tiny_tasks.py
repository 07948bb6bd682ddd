"""One data set with a target for every kind of loss, and a model that returns what each takes; in float64."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from runtime.objective import Objective


class Rows(Dataset[dict[str, Tensor]]):
    """Samples are dictionaries; ``columns`` name to tensor."""

    deterministic = True

    def __init__(self, columns: dict[str, Tensor]) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns["inputs"])

    def __getitem__(self, index: Any) -> dict[str, Tensor]:
        return {name: column[index] for name, column in self.columns.items()}

    def __getitems__(self, ids: list[int]) -> dict[str, Tensor]:
        return self[torch.tensor(ids)]


def rows(size: int = 40, split: str = "train") -> Rows:
    generator = torch.Generator().manual_seed(len(split))

    def real(*shape: int) -> Tensor:
        return torch.randn(size, *shape, generator=generator, dtype=torch.float64)

    def whole(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, (size, *shape), generator=generator)

    classes = whole(0, 4)
    return Rows(
        {
            "inputs": real(8),
            "real": real(4),
            "soft": real(4).softmax(-1),
            "count": real(4).exp(),
            "signs": real(4).sign(),
            "sign": real().sign(),
            "class": classes,
            "label": torch.where(real() > 0.3, -100, classes),  # many do not count
            "pixels": torch.where(real(3) > 0.3, -100, whole(0, 4, 3)),
            "binary": whole(0, 2, 4).double(),
            "listed": torch.cat([whole(0, 4, 1), torch.where(real(3) > 0, -1, whole(0, 4, 3))], 1),
            "letters": whole(1, 5, 3),
            "frames": whole(7, 9),
            "length": whole(1, 4),
            "trust": whole(0, 4),  # whole numbers: a sample of weight 2 is as good as two
            "user": whole(0, 6),
            "positive": whole(0, 9),
            "negative": whole(0, 9, 3),
        }
    )


class Heads(nn.Module):
    """``form`` says what is made of one, two or three linear maps of the inputs."""

    def __init__(self, form: str = "plain") -> None:
        super().__init__()
        number, width = {"pair": (2, 4), "gauss": (2, 4), "triple": (3, 4), "pixels": (1, 12), "sequence": (1, 40)}.get(
            form, (1, 4)
        )
        self.heads = nn.ModuleList(nn.Linear(8, width) for _ in range(number)).double()
        self.form = form

    def forward(self, inputs: Tensor) -> Any:
        found = [head(inputs) for head in self.heads]
        match self.form:
            case "log":
                return found[0].log_softmax(-1)
            case "sigmoid":
                return found[0].sigmoid()
            case "pixels":
                return found[0].view(-1, 4, 3)
            case "sequence":
                return found[0].view(-1, 8, 5).log_softmax(-1).transpose(0, 1)
            case "gauss":
                return {"input": found[0], "var": found[1].exp()}
            case "plain":
                return found[0]
        return tuple(found)


class Factors(nn.Module):
    """Scores of users and items."""

    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(6, 3).double(), nn.Embedding(9, 3).double()

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        return (self.users(user) * self.items(item)).sum(-1)


class TwoTasks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.label, self.size = nn.Linear(8, 4).double(), nn.Linear(8, 4).double()

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        return {"label": self.label(inputs), "size": self.size(inputs)}


@dataclass
class Output(OrderedDict[str, Any]):
    """What a transformers model returns: a mapping whose entries are attributes as well."""

    logits: Tensor
    hidden_states: tuple[Tensor, ...] = ()

    def __post_init__(self) -> None:
        for name in ("logits", "hidden_states"):
            self[name] = getattr(self, name)


class Bert(nn.Module):
    """A classifier in the manner of transformers: keyword arguments in, an object with ``logits`` out."""

    def __init__(self, num_labels: int = 3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8, padding_idx=0)
        self.types = nn.Embedding(2, 8)
        self.head = nn.Linear(8, num_labels)
        self.double()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Output:
        assert attention_mask is not None
        values = self.embedding(input_ids) + (0 if token_type_ids is None else self.types(token_type_ids))
        mask = attention_mask.unsqueeze(-1)
        return Output(self.head(torch.tanh((values * mask).sum(1) / mask.sum(1))), (values,))


class Causal(Bert):
    """The same for every position."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Output:  # type: ignore[override]
        assert attention_mask is not None
        return Output(self.head(torch.tanh(self.embedding(input_ids) * attention_mask.unsqueeze(-1))))


def sentences(size: int = 40) -> Rows:
    """What a tokenizer and a padding collate make of sentences."""
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(2, 7, (size,), generator=generator)
    mask = (torch.arange(6) < lengths[:, None]).long()
    ids = torch.randint(1, 20, (size, 6), generator=generator) * mask
    return Rows(
        {
            "inputs": ids,
            "input_ids": ids,
            "attention_mask": mask,
            "token_type_ids": (torch.arange(6) > 2).long().expand(size, 6).contiguous(),
            "label": torch.randint(0, 3, (size,), generator=generator),
            "labels": torch.where(mask == 1, ids, -100),
        }
    )


def distance(first: Tensor, second: Tensor) -> Tensor:
    return (first - second).abs().sum(-1)


class Contrastive(Objective):
    """Every sample is compared with the others of its microbatch."""

    couples_samples = True

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        values = model(batch["inputs"])["size"]
        return nn.functional.cross_entropy(values @ values.T, torch.arange(len(values)), reduction="sum")
