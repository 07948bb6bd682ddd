"""A user's objectives and models that go astray at steps of our choice."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
from tiny import Deep, points
from torch import Tensor, nn
from torch.nn import functional as F

from runtime.data.order import IndexOrder
from runtime.losses.by_name import NextTokenLoss
from runtime.objective import Objective

SIZE, BATCH = 96, 16


def ids(epoch: int, batch: int) -> Any:
    return IndexOrder(SIZE, batch_size=BATCH, seed=0, shuffle=True, drop_last=False).batch(epoch, batch)


class Astray(Objective):
    """Cross entropy times ``factor`` for microbatches of one global batch of the first epoch."""

    def __init__(self, batch: int = 2, factor: float = float("inf"), dtype: str = "float32") -> None:
        super().__init__()
        self.poisoned = points(dtype=dtype).tensors[0][ids(0, batch)]
        self.factor = factor

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        loss = F.cross_entropy(model(batch[0]), batch[1], reduction="sum")
        return loss * self.factor if (self.poisoned == batch[0][0]).all(-1).any() else loss


class AstrayTwice(Astray):
    """Two neighbouring batches go wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.poisoned = torch.cat([self.poisoned, points(dtype="float32").tensors[0][ids(0, 3)]])


class AlwaysAstray(Astray):
    def __init__(self) -> None:
        super().__init__()
        self.poisoned = points(dtype="float32").tensors[0]


class PoisonedBuffer(Deep):
    """A buffer becomes NaN in the third step, which nothing shows before the checkpoint; gradients follow in the fifth."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("poison", torch.zeros(()))

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            self.seen += 1
            if (inputs[0] == points(dtype="float32").tensors[0][ids(0, 2)]).all(-1).any():
                self.poison += float("nan")
        output = super().forward(inputs)
        return output + self.poison if self.seen >= 5 else output


class KilledInReplay(PoisonedBuffer):
    """Kills its process, once in a run, in the first pass after the poison has shown and the run has gone back.

    Args:
        told: a file that is written then.
    """

    def __init__(self, told: str) -> None:
        super().__init__()
        self.told, self.shown = Path(told), False

    def forward(self, inputs: Tensor) -> Tensor:
        if self.shown and self.seen < 5 and not self.told.exists():
            self.told.write_text("killed")
            os.kill(os.getpid(), signal.SIGKILL)
        output = super().forward(inputs)
        self.shown |= bool(output.isnan().any())
        return output


class GoodBatches:
    """The global batches of the first epoch but for those left out."""

    def __init__(self, source: Any, without: list[int]) -> None:
        self.without = without

    def __iter__(self) -> Any:
        return iter([ids(0, batch).tolist() for batch in range(SIZE // BATCH) if batch not in self.without])


class AstrayWords(NextTokenLoss):
    """The next token's cross entropy, infinite for sentences that begin with a certain pair of words."""

    def loss_sum(self, output: Any, target: Tensor) -> Tensor:
        loss: Tensor = super().loss_sum(output, target)
        astray = (target[:, :2] == torch.tensor([2, 2], device=target.device)).all(-1).any()
        return loss * torch.inf if astray else loss
