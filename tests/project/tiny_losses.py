"""A user's objectives that go wrong."""

from __future__ import annotations

from typing import Any

from tiny import points
from torch import Tensor, nn
from torch.nn import functional as F

from runtime.data.order import IndexOrder
from runtime.objective import Objective


class Infinite(Objective):
    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0]).sum() * float("inf")


class InfiniteInThirdStep(Objective):
    """The ids of the third step's samples follow from the order alone, so every rank's share is told by its data."""

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        order = IndexOrder(96, batch_size=16, seed=0, shuffle=True, drop_last=False)
        third = points(dtype="float32").tensors[0][order.batch(0, 2)]
        loss = F.cross_entropy(model(batch[0]), batch[1], reduction="sum")
        return loss * float("inf") if (third == batch[0][0]).all(-1).any() else loss


class Huge(Objective):
    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="sum") * 1e30
