"""Bayesian personalised ranking: what a user has chosen is scored above what the user has not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from runtime.data.fields import Name, part_of
from runtime.errors import ObjectiveError
from runtime.losses.supervised import PerSampleObjective, spread
from runtime.objective import Loss, full_precision, shown


class BPRLoss(PerSampleObjective):
    """``-log sigmoid(score(user, positive) - score(user, negative))``, the mean over samples (Rendle et al. 2009, 4.1).

    The model is called as ``model(user, item)`` and returns one score a row. A sample has one negative item or several, over
    which it takes the mean. Metrics are updated with the scores (batch, 1 + negatives) and 1 for the positive item, 0 for the
    negative ones.

    A batch in form of a mapping that has no negative item is one of rated items, to evaluate ranking metrics on: the model is
    called on the inputs, and its loss is the logistic loss of the target, 1 or 0.

    Args:
        user: part of the batch, (batch, …). Default: ``user``, or position 0.
        positive: item that the user has chosen, (batch,). Default: ``positive``, or position 1.
        negative: items that the user has not, (batch,) or (batch, negatives). Default: ``negative``, or position 2.
    """

    def __init__(self, user: Name | None = None, positive: Name | None = None, negative: Name | None = None) -> None:
        super().__init__()
        self._names = (user, positive, negative)

    def forward(self, model: nn.Module, batch: Any) -> Loss:
        """Score the positive item and the negative ones, one call each."""
        if self._is_rated(batch):
            return super().forward(model, batch)
        user, positive, negative = (self._part(batch, place) for place in range(3))
        high = _scores(model(user, positive), len(positive))
        repeated = user if negative.ndim == 1 else user.repeat_interleave(negative.shape[1], dim=0)
        low = _scores(model(repeated, negative.flatten()), negative.numel()).view(len(positive), -1)
        output = torch.cat([high.unsqueeze(1), low], dim=1)
        return self._weighed(F.softplus(low - high.unsqueeze(1)).mean(1), batch, output)

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
        """Return which samples metrics see, None if it is all."""
        if self._is_rated(batch) or self.fields.weight is None:
            return super().metric_mask(batch)
        weights: Tensor = self.fields.weight_of(batch)
        return spread(weights != 0, weights.shape[:1], widen=False)

    def _weighed(self, losses: Tensor, batch: Any, output: Tensor) -> Loss:
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
            f"BPRLoss: model(user, item) must return one score for each of {rows} rows, not {shown(returned)}"
        )
    return full_precision(returned).flatten()  # type: ignore[no-any-return]
