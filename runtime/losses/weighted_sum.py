"""A weighted sum of the means of several losses, each divided by what it counts itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from runtime.losses.supervised import SupervisedObjective
from runtime.objective import Loss, Objective, Weight


class WeightedSum(Objective):
    """What ``objective.losses`` says: ``sum of factor * loss sum / weight`` over the losses.

    Losses may count different things, tokens and sentences say: each has a sum and a weight of its own, and each is divided
    by its weight over the whole global batch. Where no sample of a global batch counts for one of them, the others are
    minimised. Each is reported under its name, as its mean before the factor.

    Losses of an output and a target share one call of the model; any other objective calls it itself. Metrics are given what
    the first loss gives them.

    Args:
        losses: name to objective, whose ``fields`` are set.
        factors: name to what its mean is multiplied by.

    Attributes:
        parts: the losses by name.
    """

    reads_sample_weights = True

    def __init__(self, losses: Mapping[str, Objective], factors: Mapping[str, float]) -> None:
        super().__init__()
        self.losses = nn.ModuleList(losses.values())  # a ModuleDict refuses names of its own methods
        self.num_weights = len(losses)
        self.unit = ", ".join(f"{objective.unit} ({name})" for name, objective in losses.items())
        self.couples_samples = any(objective.couples_samples for objective in losses.values())
        self.parts, self._factors = dict(losses), dict(factors)

    @property
    def counts_samples(self) -> bool:
        """Tell that there are several weights."""
        return False

    def checked_weight(self, batch: Any, samples: int) -> Weight:
        """Return the weight of each loss."""
        weights = [objective.checked_weight(batch, samples) for objective in self.parts.values()]
        return tuple(weight for weight in weights if isinstance(weight, float))

    def forward(self, model: nn.Module, batch: Any) -> Loss:
        """Return the sums of all losses, times their factors: (losses,)."""
        returned, called = None, False
        found: dict[str, Loss] = {}
        for name, objective in self.parts.items():
            if type(objective).forward is SupervisedObjective.forward:
                assert isinstance(objective, SupervisedObjective)
                if not called:
                    positional, named = self.fields.arguments(batch)
                    returned, called = model(*positional, **named), True
                found[name] = objective.compared(returned, batch)
            else:
                loss = objective.forward(model, batch)
                found[name] = loss if isinstance(loss, Loss) else Loss(loss)
        parts = {name: loss.sum.detach() for name, loss in found.items()}
        parts |= {f"{name}/{part}": value for name, loss in found.items() for part, value in loss.parts.items()}
        sums = torch.stack([self._factors[name] * loss.sum for name, loss in found.items()])
        return Loss(sums, parts, next(iter(found.values())).output)

    def means(self, sums: Mapping[str, float], weight: Weight) -> dict[str, float]:
        """Return each loss's mean, and ``loss``, the sum of the means times their factors."""
        if not isinstance(weight, tuple):
            return {}
        weights = dict(zip(self._factors, weight, strict=True))
        means = {name: total / of for name, total in sums.items() if (of := weights[name.partition("/")[0]]) > 0}
        return {"loss": sum(self._factors[name] * means[name] for name in self._factors if name in means), **means}

    def predicted(self, output: Any) -> Mapping[str, Tensor]:
        """Return what the first loss says of the output."""
        return next(iter(self.parts.values())).predicted(output)

    def metric_inputs(self, output: Any, batch: Any) -> tuple[Any, ...]:
        """Return what the first loss gives the metrics."""
        return next(iter(self.parts.values())).metric_inputs(output, batch)

    def metric_mask(self, batch: Any) -> Tensor | None:
        """Return which elements of the first loss's target metrics see."""
        return next(iter(self.parts.values())).metric_mask(batch)

    def soft_target(self, batch: Any) -> Tensor | None:
        """Return what the first loss does."""
        return next(iter(self.parts.values())).soft_target(batch)
