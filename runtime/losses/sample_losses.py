"""Torch losses with exactly one value per sample."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from runtime.errors import ObjectiveError
from runtime.losses.supervised import PerSampleObjective, SupervisedObjective
from runtime.losses.torch_losses import TorchLoss, binarized, check_range
from runtime.objective import describe


class PerSampleLoss(PerSampleObjective, TorchLoss):
    """One loss per sample. Output: (batch, dim), or several tensors of this shape."""

    def _reduced(self, output: Any, target: Any, reduction: str) -> Tensor:
        inputs = self.output_tensors(output) if self.outputs else (output,)
        for value in inputs:
            if value.ndim != 2:
                raise ObjectiveError(f"{self.name} needs outputs of shape (batch, dim), not {describe(value)}")
        if self.has_target and self.target_is == "values":
            target = self.like(inputs[0], target)
        return self._call(reduction, *inputs, *((target,) if self.has_target else ()))


class DivergenceLoss(PerSampleLoss):
    """KLDivLoss, summed over all but the first dimension. Output: log-probabilities (batch, …); target: the same shape."""

    def _reduced(self, output: Any, target: Any, reduction: str) -> Tensor:
        self.same_shape(output, target)
        losses = self._call(reduction, output, self.like(output, target))
        return losses if reduction == "sum" else losses.flatten(1).sum(1)

    def predictions(self, output: Any, target: Any) -> tuple[Any, ...]:
        """Return probabilities."""
        return output.exp(), target.exp() if self.loss.log_target else target


class MultiClassMarginLoss(PerSampleLoss):
    """MultiMarginLoss. Output: scores (batch, classes); target: (batch,) of class numbers."""

    target_is = "classes"

    def predictions(self, output: Any, target: Any) -> tuple[Any, ...]:
        """Return scores that sum to 1, and class indices."""
        return output.softmax(-1), target

    def predicted(self, output: Any) -> Mapping[str, Tensor]:
        """Return the output, and scores that sum to 1."""
        return {"output": output, "probabilities": output.softmax(-1)}


class MultiLabelLoss(PerSampleLoss):
    """MultiLabelSoftMarginLoss and MultiLabelMarginLoss. Output: scores (batch, classes).

    Target: 0 or 1 (batch, classes); for MultiLabelMarginLoss the indices of the true classes, then -1.
    """

    def __init__(self, loss: nn.Module) -> None:
        super().__init__(loss)
        self._lists_classes = isinstance(loss, nn.MultiLabelMarginLoss)
        self.target_is = "classes" if self._lists_classes else "values"

    def predictions(self, output: Any, target: Any) -> tuple[Any, ...]:
        """Return a probability, or a score within [0, 1], and 0 or 1 for each class."""
        if self._lists_classes:
            listed = (target >= 0).cumprod(1)  # everything after the first -1 is ignored
            target = torch.zeros_like(target).scatter_add_(1, target.clamp(min=0), listed).clamp(max=1)
        return output.sigmoid(), binarized(target)

    def metric_inputs(self, output: Any, batch: Any) -> tuple[Any, ...]:
        """Return a probability, or a score within [0, 1], and 0 or 1 for each class."""
        if not self._lists_classes:
            check_range(self.name, self._counted(self.target_of(batch), batch))
        return super().metric_inputs(output, batch)

    def soft_target(self, batch: Any) -> Tensor | None:
        """Return the probability of each label; None if the target lists class indices."""
        return None if self._lists_classes else self._counted(self.target_of(batch), batch)

    def predicted(self, output: Any) -> Mapping[str, Tensor]:
        """Return the output, and a probability, or a score within [0, 1], for each label."""
        return {"output": output, "probability": output.sigmoid()}


class PairLoss(PerSampleLoss):
    """CosineEmbeddingLoss of two vectors; the target is 1 for similar pairs, else -1."""

    outputs = ("input1", "input2")

    def predictions(self, output: Any, target: Any) -> tuple[Any, ...]:
        """Return the cosine similarity, rescaled to [0, 1], and 1 for similar pairs, else 0."""
        first, second = self.output_tensors(output)
        return (1 + F.cosine_similarity(first, second)).clamp(0, 2) / 2, binarized(target, signed=True)

    def metric_inputs(self, output: Any, batch: Any) -> tuple[Any, ...]:
        """Return the similarity and 0 or 1."""
        check_range(self.name, self._counted(self.target_of(batch), batch), signed=True)
        return super().metric_inputs(output, batch)


class TripletLoss(PerSampleLoss):
    """TripletMarginLoss and TripletMarginWithDistanceLoss; the batch has no target."""

    outputs = ("anchor", "positive", "negative")
    has_target = False

    def predictions(self, output: Any, target: Any) -> tuple[Any, ...]:
        """Return the three vectors."""
        return (*self.output_tensors(output),)


class SequenceLoss(PerSampleLoss):
    """CTCLoss. Output: log-probabilities (time, batch, classes); target: classes, lengths of output and of target."""

    target_is = "anything"

    def losses(self, output: Any, target: Any) -> Tensor:
        """Return each sample's loss divided by the length of its target."""
        try:
            classes, output_lengths, target_lengths = target
        except (TypeError, ValueError):
            raise ObjectiveError(
                "CTCLoss needs data.fields.target: [targets, input_lengths, target_lengths], three parts of the batch"
            ) from None
        losses = self._call("none", output, classes, output_lengths, target_lengths)
        lengths: Tensor = target_lengths.clamp(min=1).to(losses.device)
        return losses / lengths

    loss_sum = SupervisedObjective.loss_sum

    def metric_inputs(self, output: Any, batch: Any) -> tuple[Any, ...]:
        """Return the output and the three parts of the target, for a custom metric that decodes them."""
        return output, *self.fields.target_of(batch)
