"""Bayesian personalised ranking: items that a user chose should score above items that the user did not choose."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from runtime.data.fields import Name, part_of
from runtime.errors import ObjectiveError
from runtime.losses.supervised import PerSampleObjective, spread
from runtime.objective import Loss, describe, full_precision


class BPRLoss(PerSampleObjective):
    """``-log sigmoid(score(user, positive) - score(user, negative))``, the mean over samples (Rendle et al. 2009, 4.1).

    The model is called as ``model(user, item)`` and returns one score per row. The loss of a sample is the mean over its
    negative items. Metrics are updated with the scores (batch, 1 + negatives) and 1 for the positive item, 0 for the
    negative ones.

    A mapping without a negative item is a batch of rated items, for ranking metrics: the model is called on the inputs, and
    the loss is the logistic loss of the target, 1 or 0.

    Args:
        user: part of the batch, (batch, …). Default: ``user``, or position 0.
        positive: item that the user chose, (batch,). Default: ``positive``, or position 1.
        negative: items that the user did not choose, (batch,) or (batch, negatives). Default: ``negative``, or position 2.
    """

    def __init__(self, user: Name | None = None, positive: Name | None = None, negative: Name | None = None) -> None:
        super().__init__()
        self._names = (user, positive, negative)

    def forward(self, model: nn.Module, batch: Any) -> Loss:
        """Score the positive items in one call of the model and the negative ones in another."""
        if self._is_rated(batch):
            return super().forward(model, batch)
        user, positive, negative = (self._part(batch, place) for place in range(3))
        high = _scores(model(user, positive), len(positive))
        repeated = user if negative.ndim == 1 else user.repeat_interleave(negative.shape[1], dim=0)
        low = _scores(model(repeated, negative.flatten()), negative.numel()).view(len(positive), -1)
        output = torch.cat([high.unsqueeze(1), low], dim=1)
        return self._weighted_sum(F.softplus(low - high.unsqueeze(1)).mean(1), batch, output)

    def losses(self, output: Any, target: Any) -> Tensor:
        """Return the logistic losses of rated items."""
        self.same_shape(output, target)
        return F.binary_cross_entropy_with_logits(output, target.to(output.dtype), reduction="none")

    def metric_inputs(self, output: Any, batch: Any) -> tuple[Any, ...]:
        """Return scores and relevance."""
        if self._is_rated(batch):
            return super().metric_inputs(output, batch)
        relevant = torch.zeros_like(output, dtype=torch.long)
        relevant[:, 0] = 1
        if self.fields.weight is None:
            return output, relevant
        counted = spread(self.fields.weight_of(batch) != 0, output.shape, widen=False)
        return output[counted], relevant[counted]

    def metric_mask(self, batch: Any) -> Tensor | None:
        """Return a mask of the samples that metrics receive; None if all."""
        if self._is_rated(batch) or self.fields.weight is None:
            return super().metric_mask(batch)
        weights: Tensor = self.fields.weight_of(batch)
        return spread(weights != 0, weights.shape[:1], widen=False)

    def _weighted_sum(self, losses: Tensor, batch: Any, output: Tensor) -> Loss:
        if self.fields.weight is not None:
            losses = losses * spread(self.fields.weight_of(batch), losses.shape).to(losses.dtype)
        return Loss(losses.sum(), output=output)

    def _part(self, batch: Any, place: int) -> Any:
        name = self._names[place]
        if name is None:
            name = ("user", "positive", "negative")[place] if isinstance(batch, Mapping) else place
        return part_of(batch, name)

    def _is_rated(self, batch: Any) -> bool:
        return isinstance(batch, Mapping) and (self._names[2] or "negative") not in batch


def _scores(returned: Tensor, rows: int) -> Tensor:
    if returned.numel() != rows:
        raise ObjectiveError(
            f"BPRLoss: model(user, item) must return one score for each of {rows} rows, not {describe(returned)}"
        )
    return full_precision(returned).flatten()  # type: ignore[no-any-return]
