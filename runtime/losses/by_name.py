"""Torch's losses by name, and the weight of each.

The runtime sets ``reduction``. The weight is the divisor of torch's ``reduction="mean"`` over the whole global batch, and for
KLDivLoss that of ``"batchmean"``, the mathematical definition of the divergence (torch warns that its "mean" is not):

==============================================  =======================================================================
loss                                            weight: the number of …
==============================================  =======================================================================
MSELoss, L1Loss, SmoothL1Loss, HuberLoss,       elements of the target
BCELoss, BCEWithLogitsLoss, PoissonNLLLoss,
GaussianNLLLoss, SoftMarginLoss,
HingeEmbeddingLoss, MarginRankingLoss
CrossEntropyLoss, NLLLoss                       targets that are not ``ignore_index``; with class weights the sum of theirs;
                                                for class probabilities the targets
NextTokenLoss, FocalLoss                        tokens, targets that are not ``ignore_index``
KLDivLoss ("batchmean"), MultiMarginLoss,       samples
MultiLabelMarginLoss, MultiLabelSoftMarginLoss,
CosineEmbeddingLoss, TripletMarginLoss,
TripletMarginWithDistanceLoss, CTCLoss, BPRLoss
a custom class that takes ``reduction``         elements of the target, whose shape its input must have
==============================================  =======================================================================

``weight`` of the binary losses and of MultiMarginLoss, ``pos_weight`` and ``alpha`` change only the sum, as in torch. With
``data.fields.weight`` each counted item is multiplied by its sample's weight. CTCLoss first divides each sample's loss by the
length of its target, as torch's mean does.

Losses that take several tensors take them from the model, as a tuple in torch's order or a mapping with torch's names:
GaussianNLLLoss (input, var), CosineEmbeddingLoss and MarginRankingLoss (input1, input2), TripletMarginLoss (anchor, positive,
negative; no target). CTCLoss takes three parts of the batch: ``data.fields.target: [targets, input_lengths, target_lengths]``.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from runtime.errors import ObjectiveError
from runtime.losses.sample_losses import (
    DivergenceLoss,
    MultiClassMarginLoss,
    MultiLabelLoss,
    PairLoss,
    SequenceLoss,
    TripletLoss,
)
from runtime.losses.supervised import SupervisedObjective, counted_mask
from runtime.losses.torch_losses import TorchLoss, binarized, check_range
from runtime.objective import Objective, describe

EXCLUDED = {  # torch losses that cannot be objectives, and why
    "NLLLoss2d": "it is an old name of NLLLoss; use that",
    "LinearCrossEntropyLoss": (
        "it holds the model's last layer, which predictions and exports would lack; let the model end in nn.Linear and use "
        "CrossEntropyLoss"
    ),
    "AdaptiveLogSoftmaxWithLoss": (
        "it holds the model's last layers and averages internally; put it into the model, return its log_prob, and use NLLLoss"
    ),
}


class BinaryLoss(TorchLoss):
    """BCELoss, BCEWithLogitsLoss, SoftMarginLoss: metrics receive probabilities of the positive class.

    torchmetrics treats scores within [0, 1] as probabilities and applies a sigmoid otherwise, batch by batch: on logits its
    result would depend on how the data is batched. A target between 0 and 1 (smoothed labels, mixup) is the probability of
    the positive class: metrics of classes receive the more probable class.
    """

    @property
    def _signed(self) -> bool:
        return isinstance(self.loss, nn.SoftMarginLoss)  # its targets are -1 and 1

    def predictions(self, output: Any, target: Any) -> tuple[Any, ...]:
        """Return probabilities and 0 or 1."""
        return self._probabilities(output), binarized(target, signed=self._signed)

    def metric_inputs(self, output: Any, batch: Any) -> tuple[Any, ...]:
        """Return probabilities and 0 or 1.

        Raises:
            ObjectiveError: a target is outside the loss's range.
        """
        check_range(self.name, self._counted(self.target_of(batch), batch), signed=self._signed)
        return super().metric_inputs(output, batch)

    def soft_target(self, batch: Any) -> Tensor | None:
        """Return the probabilities of the positive class."""
        target = self._counted(self.target_of(batch), batch)
        return (target + 1) / 2 if self._signed else target

    def predicted(self, output: Any) -> Mapping[str, Tensor]:
        """Return the output and the probability of the positive class."""
        return {"output": output, "probability": self._probabilities(output)}

    def _probabilities(self, output: Tensor) -> Tensor:
        return output if isinstance(self.loss, nn.BCELoss) else output.sigmoid()


class PoissonLoss(TorchLoss):
    """PoissonNLLLoss: metrics receive the rate."""

    def predictions(self, output: Any, target: Any) -> tuple[Any, ...]:
        """Return rates and counts."""
        return self.predicted(output)["output"], target

    def predicted(self, output: Any) -> Mapping[str, Tensor]:
        """Return the rate as the output."""
        return {"output": output.exp() if self.loss.log_input else output}


class GaussianLoss(TorchLoss):
    """GaussianNLLLoss of a mean and a variance: metrics receive the mean."""

    outputs = ("input", "var")

    def _reduced(self, output: Any, target: Any, reduction: str) -> Tensor:
        mean, variance = self.output_tensors(output)
        self.same_shape(mean, target)
        return self._call(reduction, mean, self.like(mean, target), variance)

    def predictions(self, output: Any, target: Any) -> tuple[Any, ...]:
        """Return means and target."""
        return self.output_tensors(output)[0], target

    def predicted(self, output: Any) -> Mapping[str, Tensor]:
        """Return the mean as the output, and the variance."""
        mean, variance = self.output_tensors(output)
        return {"output": mean, "variance": variance}


class RankingLoss(TorchLoss):
    """MarginRankingLoss of two scores; the target is 1 where the first should be higher, else -1."""

    outputs = ("input1", "input2")

    def _reduced(self, output: Any, target: Any, reduction: str) -> Tensor:
        first, second = self.output_tensors(output)
        self.same_shape(first, target)
        self.same_shape(second, target)
        return self._call(reduction, first, second, self.like(first, target))

    def predictions(self, output: Any, target: Any) -> tuple[Any, ...]:
        """Return the probability that the first is higher (sigmoid of the difference), and 1 where it should be, else 0."""
        first, second = self.output_tensors(output)
        return (first - second).sigmoid(), binarized(target, signed=True)

    def metric_inputs(self, output: Any, batch: Any) -> tuple[Any, ...]:
        """Return probabilities and 0 or 1."""
        check_range(self.name, self._counted(self.target_of(batch), batch), signed=True)
        return super().metric_inputs(output, batch)


class ClassificationLoss(TorchLoss):
    """CrossEntropyLoss or NLLLoss: class indices or, for cross entropy, class probabilities as target.

    Output: (batch, classes, …); target: (batch, …) int64, or of the output's shape in floating point.
    """

    unit = "targets"
    target_is = "classes"
    _class_dim = 1

    def __init__(self, loss: nn.Module) -> None:
        super().__init__(loss)
        self._ignore_index: int = loss.ignore_index  # type: ignore[assignment]
        if self._constants:
            self.unit = "targets' class weights"

    def fractions(self, target: Tensor) -> Tensor:
        """Accept class probabilities, for cross entropy."""
        has_class_dim = target.ndim > 1 and target.shape[self._class_dim] > 1
        if self.takes_probabilities and has_class_dim and target.is_floating_point():
            return target
        expected = "class numbers (an integer type)"
        raise self.wrong_target(
            target, f"{expected} or probabilities of the output's shape" if self.takes_probabilities else expected
        )

    @property
    def takes_probabilities(self) -> bool:
        """Whether the target may be the probabilities of all classes."""
        return isinstance(self.loss, nn.CrossEntropyLoss)

    def hint(self, output: Any, target: Any) -> str:
        """Explain why the target does not fit the output."""
        if output.ndim < 2 or not output.is_floating_point():
            return "; the output must be scores in floating point, (batch, classes)"
        if not isinstance(target, Tensor):
            return ""
        classes = output.shape[self._class_dim]
        if target.is_floating_point():
            return f"; probabilities need the output's shape {tuple(output.shape)}"
        if target.shape == output.shape:
            return "; convert a one-hot target to class numbers (target.argmax(1)), or to floating point"
        if target.ndim == output.ndim and target.shape[self._class_dim] == 1:
            return "; squeeze the target's dimension of size 1 (for a Table: task: classification, not binary)"
        wrong = target[(target != self._ignore_index) & ((target < 0) | (target >= classes))]
        if wrong.numel():
            return f"; the model has {classes} outputs, for classes 0 to {classes - 1}, but a target is {int(wrong[0])}"
        return ""

    def _reduced(self, output: Any, target: Any, reduction: str) -> Tensor:
        try:
            return self._call(reduction, output, self.like(output, target) if target.is_floating_point() else target)
        except (RuntimeError, ValueError) as error:
            if output.ndim == 3 and output.shape[:2] == target.shape:
                raise ObjectiveError(
                    f"{self.name} needs classes in dimension 1, but the output is {describe(output)} for targets of "
                    f"{tuple(target.shape)}; NextTokenLoss takes classes last"
                ) from error
            raise

    def count(self, target: Any) -> float:
        """Return the number of targets that are not ignored, or the sum of their class weights."""
        if self._constants or target.is_floating_point():
            return float(self.counts(target).sum())
        # In NumPy: for such small arrays it takes a third of torch's time.
        return float(np.count_nonzero(target.numpy() != self._ignore_index))

    def counts(self, target: Any) -> Tensor:
        """Return each target's count: 0 if it is ignored, else 1 or its class's weight."""
        if target.is_floating_point():
            return torch.ones((), dtype=torch.float64).expand(target.select(self._class_dim, 0).shape)
        counted: Tensor = target != self._ignore_index
        if not self._constants:
            return counted.double()
        class_weights, classes = self._constants["weight"], target.where(counted, 0)
        if classes.numel() and not 0 <= int(classes.min()) <= int(classes.max()) < len(class_weights):
            wrong = int(classes.min()) if int(classes.min()) < 0 else int(classes.max())
            raise ObjectiveError(f"{self.name} has weights for {len(class_weights)} classes, but a target is {wrong}")
        counts: Tensor = class_weights[classes] * counted
        return counts

    def metric_inputs(self, output: Any, batch: Any) -> tuple[Any, ...]:
        """Return probabilities (targets, classes) and class indices (targets,), without ignored targets.

        Probabilities, not logits, for the reason given in :class:`BinaryLoss`.
        """
        scores, target = super().metric_inputs(output.movedim(self._class_dim, -1), batch)
        scores, target = scores.flatten(0, -2), target.flatten()
        counted = target != self._ignore_index
        return self._probabilities(scores[counted]), target[counted]

    def soft_target(self, batch: Any) -> Tensor | None:
        """Return class probabilities (targets, classes); None if the target is class numbers."""
        target = self.target_of(batch)
        if not target.is_floating_point():
            return None
        return self._counted(target.movedim(self._class_dim, -1), batch).flatten(0, -2)

    def predicted(self, output: Any) -> Mapping[str, Tensor]:
        """Return the output and the class probabilities, both with the classes last."""
        scores = output.movedim(self._class_dim, -1)
        return {"output": scores, "probabilities": self._probabilities(scores)}

    def _probabilities(self, scores: Tensor) -> Tensor:
        return scores.exp() if isinstance(self.loss, nn.NLLLoss) else scores.softmax(-1)

    def metric_mask(self, batch: Any) -> Tensor:
        """Return a mask of the targets that metrics receive."""
        _, target = self.predictions(None, self.target_of(batch))
        return counted_mask(target, self._ignore_index, super().metric_mask(batch))

    def predictions(self, output: Any, target: Any) -> tuple[Any, ...]:
        """Return scores, classes last, and class indices."""
        return output, target.argmax(self._class_dim) if target.is_floating_point() else target


class NextTokenLoss(ClassificationLoss):
    """Cross entropy of the next token. Output: (batch, time, vocabulary); target: (batch, time) int64.

    Args:
        ignore_index: target value of ignored positions.
        label_smoothing: fraction of the target spread evenly over the vocabulary.
        shift: the target is the input itself, as in Hugging Face's ``labels``: the output at each position is compared with
            the target at the next.
    """

    unit = "tokens"
    takes_probabilities = False
    _class_dim = -1

    def __init__(self, ignore_index: int = -100, label_smoothing: float = 0.0, shift: bool = False) -> None:
        super().__init__(nn.CrossEntropyLoss(ignore_index=ignore_index, label_smoothing=label_smoothing))
        self._shift = shift

    name = SupervisedObjective.name

    def _reduced(self, output: Any, target: Any, reduction: str) -> Tensor:
        if output.shape[:-1] != target.shape:
            raise ObjectiveError(
                f"{self.name} needs an output of shape {(*target.shape, 'vocabulary')}, not {tuple(output.shape)}"
            )
        if self._shift:  # appending an ignored target avoids a copy of the output without the last position
            target = F.pad(target[:, 1:], (0, 1), value=self._ignore_index)
        losses = self._call(reduction, output.flatten(0, -2), target.flatten())
        return losses if reduction == "sum" else losses.view_as(target)

    def count(self, target: Any) -> float:
        """Return the number of targets that are not ignored."""
        return super().count(target[:, 1:] if self._shift else target)

    def counts(self, target: Any) -> Tensor:
        """Return 1 for each target that is not ignored."""
        return super().counts(F.pad(target[:, 1:], (0, 1), value=self._ignore_index) if self._shift else target)

    def predictions(self, output: Any, target: Any) -> tuple[Any, ...]:
        """Return scores and class indices per position."""
        return output, F.pad(target[:, 1:], (0, 1), value=self._ignore_index) if self._shift else target


_OBJECTIVES: tuple[tuple[tuple[type[nn.Module], ...], type[TorchLoss]], ...] = (
    ((nn.CrossEntropyLoss, nn.NLLLoss), ClassificationLoss),
    ((nn.BCELoss, nn.BCEWithLogitsLoss, nn.SoftMarginLoss), BinaryLoss),
    ((nn.PoissonNLLLoss,), PoissonLoss),
    ((nn.GaussianNLLLoss,), GaussianLoss),
    ((nn.KLDivLoss,), DivergenceLoss),
    ((nn.MarginRankingLoss,), RankingLoss),
    ((nn.MultiMarginLoss,), MultiClassMarginLoss),
    ((nn.MultiLabelMarginLoss, nn.MultiLabelSoftMarginLoss), MultiLabelLoss),
    ((nn.CosineEmbeddingLoss,), PairLoss),
    ((nn.TripletMarginLoss, nn.TripletMarginWithDistanceLoss), TripletLoss),
    ((nn.CTCLoss,), SequenceLoss),
)


def refusal(loss_class: type[nn.Module], args: Mapping[str, Any]) -> str | None:
    """Return why a class with these arguments cannot be an objective, or None if it can."""
    name = loss_class.__name__
    if name in EXCLUDED and loss_class.__module__.startswith("torch."):
        return f"{name} cannot be an objective: {EXCLUDED[name]}"
    if "reduction" not in inspect.signature(loss_class).parameters:
        return f"{name} is not a loss of torch; write an Objective (docs/guides/own-model.md)"
    reserved = [key for key in ("reduction", "size_average", "reduce") if key in args]
    return f"{name} sets {reserved[0]}, which Lockstep sets; leave it out" if reserved else None


def torch_loss(loss_class: type[nn.Module], args: Mapping[str, Any]) -> Objective:
    """Build an objective from a torch loss; ``reduction`` is set here, and lists of class weights become tensors.

    Raises:
        ObjectiveError: the class is not a loss, or cannot be an objective.
    """
    reason = refusal(loss_class, args)
    if reason is not None:
        raise ObjectiveError(reason)
    tensors = {key: torch.tensor(v, dtype=torch.float64) if isinstance(v, list) else v for key, v in args.items()}
    loss = loss_class(**tensors, reduction="sum")
    for classes, objective in _OBJECTIVES:
        if isinstance(loss, classes):
            return objective(loss)
    return TorchLoss(loss)
