"""Focal loss: cross entropy that gives less weight to well-classified targets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from runtime.errors import ObjectiveError
from runtime.losses.supervised import SupervisedObjective, counted_mask
from runtime.losses.torch_losses import binarized, check_range
from runtime.objective import full_precision


class FocalLoss(SupervisedObjective):
    """``-alpha_t (1 - p_t)^gamma log(p_t)``, where ``p_t`` is the probability of the true class (Lin et al. 2017, eq. 5).

    Binary, with one label or several: logits and target of one shape, target 0 or 1 (for soft labels, in between, ``p_t`` is
    the probability of agreement). Multi-class: logits (batch, classes, …), target (batch, …) int64. With gamma 0 it is
    cross entropy. It is divided by the number of targets, not by the sum of their alphas.

    Args:
        gamma: focusing exponent, 0 or more.
        alpha: factors of the classes' losses. Binary: that of class 1, and class 0 has ``1 - alpha``; or both, class 0
            first. Multi-class: one for each class, or one for all.
        ignore_index: target value to ignore.
    """

    unit = "targets"
    target_is = "classes"

    def __init__(self, gamma: float = 2.0, alpha: float | list[float] | None = None, ignore_index: int = -100) -> None:
        super().__init__()
        values = [alpha] if isinstance(alpha, int | float) else list(alpha or [])
        if not gamma >= 0 or not all(value >= 0 for value in values):
            raise ObjectiveError("FocalLoss: gamma and alpha must not be negative")
        if isinstance(alpha, int | float) and alpha > 1:
            raise ObjectiveError(
                "FocalLoss: a single alpha must be between 0 and 1; otherwise give a list, one for each class"
            )
        self._gamma, self._values, self._ignore_index = gamma, values, ignore_index

    def losses(self, output: Any, target: Any) -> Tensor:
        """Return the losses, in the target's shape."""
        logits = full_precision(output)
        if logits.shape == target.shape:
            return self._binary(logits, target)
        fits = logits.ndim == target.ndim + 1 and logits.shape[:1] + logits.shape[2:] == target.shape
        if not fits or target.is_floating_point():
            raise ObjectiveError(
                f"FocalLoss needs logits of the target's shape {tuple(target.shape)}, or with classes in dimension 1, "
                f"not {tuple(output.shape)}; class indices are integers"
            )
        return self._multi_class(logits, target)

    def _checked(self, target: Any) -> Tensor:
        if not isinstance(target, Tensor):
            raise self.wrong_target(target)
        return target if target.is_floating_point() else target.long()  # uint8 cannot represent -100

    def _binary(self, logits: Tensor, target: Tensor) -> Tensor:
        counted = target != self._ignore_index
        truth = torch.where(counted, target, 0).to(logits.dtype)
        cross_entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
        # 1 - p_t from sigmoids of both signs: 1 - sigmoid(x) would lose all digits of a small result.
        missed = logits.sigmoid() * (1 - truth) + (-logits).sigmoid() * truth
        losses = self._modulated(cross_entropy, missed)
        if self._values:
            if len(self._values) > 2:
                raise ObjectiveError(f"FocalLoss has {len(self._values)} alphas for a binary target; give one, or two")
            negative, positive = self._values if len(self._values) == 2 else (1 - self._values[0], self._values[0])
            losses = losses * (negative * (1 - truth) + positive * truth)
        return losses * counted

    def _multi_class(self, logits: Tensor, target: Tensor) -> Tensor:
        counted = target != self._ignore_index
        truth = torch.where(counted, target, 0)
        log_probability = logits.log_softmax(1).gather(1, truth.unsqueeze(1)).squeeze(1)
        losses = self._modulated(-log_probability, -torch.expm1(log_probability))
        if len(self._values) > 1:
            if len(self._values) != logits.shape[1]:
                raise ObjectiveError(f"FocalLoss has {len(self._values)} alphas for {logits.shape[1]} classes")
            losses = losses * logits.new_tensor(self._values)[truth]
        elif self._values:
            losses = losses * self._values[0]
        return losses * counted

    def _modulated(self, cross_entropy: Tensor, missed: Tensor) -> Tensor:
        if self._gamma == 0:
            return cross_entropy
        # Zero to a power below one has an infinite derivative, which times zero would be NaN.
        return cross_entropy * missed.clamp(min=torch.finfo(missed.dtype).tiny).pow(self._gamma)

    def counts(self, target: Any) -> Tensor:
        """Return 1 for each target that is not ignored."""
        counted: Tensor = target != self._ignore_index
        return counted.double()

    def count(self, target: Any) -> float:
        """Return the number of targets that are not ignored."""
        return float((target != self._ignore_index).sum())

    def metric_mask(self, batch: Any) -> Tensor:
        """Return a mask of the targets that metrics receive."""
        return counted_mask(self.target_of(batch), self._ignore_index, super().metric_mask(batch))

    def metric_inputs(self, output: Any, batch: Any) -> tuple[Any, ...]:
        """Return probabilities and integer targets, without ignored ones."""
        binary = output.shape == self.target_of(batch).shape
        scores, target = super().metric_inputs(output if binary else output.movedim(1, -1), batch)
        counted = target != self._ignore_index
        probabilities = scores.sigmoid() if binary else scores.softmax(-1)
        if not binary:
            return probabilities[counted], target[counted]
        check_range(self.name, target[counted])
        if bool(counted.all()):  # keep the shape (batch, labels): it gives the number of labels
            return probabilities, binarized(target)
        return probabilities[counted], binarized(target[counted])

    def soft_target(self, batch: Any) -> Tensor | None:
        """Return the probabilities of the positive class; None if the target is class numbers."""
        target = self._counted(self.target_of(batch), batch)
        if not target.is_floating_point():
            return None
        counted = target != self._ignore_index
        return target if bool(counted.all()) else target[counted]

    def predicted(self, output: Any) -> Mapping[str, Tensor]:
        """Return the output and probabilities: the positive class's for (batch,) and (batch, 1), else all classes'."""
        if output.ndim == 1 or output.shape[1:] == (1,):
            return {"output": output, "probability": output.sigmoid()}
        scores = output.movedim(1, -1)
        return {"output": scores, "probabilities": scores.softmax(-1)}
