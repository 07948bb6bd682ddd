"""A weighted sum of the means of several losses, each with its own divisor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from runtime.losses.supervised import SupervisedObjective
from runtime.objective import Loss, Objective, Weight


class WeightedSum(Objective):
    """The objective for ``objective.losses``: ``sum of factor * loss sum / weight`` over the losses.

    Losses may count different things, such as tokens and sentences: each has its own sum and weight, and is divided by its
    weight over the whole global batch. A loss for which no sample of a global batch counts is left out of that step. Each is
    reported under its name, as its mean before the factor.

    Supervised losses share one call of the model; any other objective calls it itself. Metrics receive the inputs that the
    first loss gives.

    Args:
        losses: objective by name, with ``fields`` set.
        factors: factor of the mean, by name.

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
        """False: there are several weights."""
        return False

    def checked_weight(self, batch: Any, samples: int) -> Weight:
        """Return the weight of each loss."""
        weights = [objective.checked_weight(batch, samples) for objective in self.parts.values()]
        return tuple(weight for weight in weights if isinstance(weight, float))

    def forward(self, model: nn.Module, batch: Any) -> Loss:
        """Return the sums of all losses, times their factors: (losses,)."""
        returned, called = None, False
        losses: dict[str, Loss] = {}
        for name, objective in self.parts.items():
            if type(objective).forward is SupervisedObjective.forward:
                assert isinstance(objective, SupervisedObjective)
                if not called:
                    positional, named = self.fields.arguments(batch)
                    returned, called = model(*positional, **named), True
                losses[name] = objective.loss_of(returned, batch)
            else:
                loss = objective.forward(model, batch)
                losses[name] = loss if isinstance(loss, Loss) else Loss(loss)
        parts = {name: loss.sum.detach() for name, loss in losses.items()}
        parts |= {f"{name}/{part}": value for name, loss in losses.items() for part, value in loss.parts.items()}
        sums = torch.stack([self._factors[name] * loss.sum for name, loss in losses.items()])
        return Loss(sums, parts, next(iter(losses.values())).output)

    def means(self, sums: Mapping[str, float], weight: Weight) -> dict[str, float]:
        """Return each loss's mean, and ``loss``, the sum of the means times their factors."""
        if not isinstance(weight, tuple):
            return {}
        weights = dict(zip(self._factors, weight, strict=True))
        means = {name: total / of for name, total in sums.items() if (of := weights[name.partition("/")[0]]) > 0}
        return {"loss": sum(self._factors[name] * means[name] for name in self._factors if name in means), **means}

    def predicted(self, output: Any) -> Mapping[str, Tensor]:
        """Return the first loss's predictions."""
        return next(iter(self.parts.values())).predicted(output)

    def metric_inputs(self, output: Any, batch: Any) -> tuple[Any, ...]:
        """Return the first loss's metric inputs."""
        return next(iter(self.parts.values())).metric_inputs(output, batch)

    def metric_mask(self, batch: Any) -> Tensor | None:
        """Return the first loss's metric mask."""
        return next(iter(self.parts.values())).metric_mask(batch)

    def soft_target(self, batch: Any) -> Tensor | None:
        """Return the first loss's soft target."""
        return next(iter(self.parts.values())).soft_target(batch)
