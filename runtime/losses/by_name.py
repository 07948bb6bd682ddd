"""Torch's losses by name, and what each is divided by.

``reduction`` is the runtime's. The weight is that of torch's own ``reduction="mean"`` over the whole global batch, and for
KLDivLoss that of ``"batchmean"``, which is the divergence of mathematics (torch's "mean" is not, as it warns):

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
a class of one's own that takes ``reduction``   elements of the target, which its input must have the shape of
==============================================  =======================================================================

``weight`` of the binary losses and of MultiMarginLoss, ``pos_weight`` and ``alpha`` change the sum alone, as in torch. With
``data.fields.weight`` each thing counted counts its sample's weight. CTCLoss divides each sample's loss by the length of its
target first, as torch's mean does.

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
from runtime.losses.supervised import SupervisedObjective, counted_of
from runtime.losses.torch_losses import TorchLoss, check_range, likelier
from runtime.objective import Objective, shown

EXCLUDED = {  # losses of torch that cannot be objectives, and why
    "NLLLoss2d": "it is an old name of NLLLoss; use that",
    "LinearCrossEntropyLoss": (
        "it holds the model's last layer, which predictions and exports would lack; let the model end in nn.Linear and use "
        "CrossEntropyLoss"
    ),
    "AdaptiveLogSoftmaxWithLoss": (
        "it holds the model's last layers and averages by itself; put it into the model, return its log_prob, and use NLLLoss"
    ),
}


class BinaryLoss(TorchLoss):
    """BCELoss, BCEWithLogitsLoss, SoftMarginLoss: metrics see probabilities of the positive class.

    torchmetrics takes scores within [0, 1] for probabilities and applies a sigmoid otherwise, batch by batch: on logits its
    result would depend on how the data is cut. A target between 0 and 1 (smoothed labels, mixup) is the probability of a
    yes: metrics of classes see which of the two is likelier.
    """

    @property
    def _signed(self) -> bool:
        return isinstance(self.loss, nn.SoftMarginLoss)  # its targets are -1 and 1

    def predictions(self, output: Any, target: Any) -> tuple[Any, ...]:
        """Return probabilities and 0 or 1."""
        return self._probabilities(output), likelier(target, signed=self._signed)

    def metric_inputs(self, output: Any, batch: Any) -> tuple[Any, ...]:
        """Return probabilities and 0 or 1.

        Raises:
            ObjectiveError: a target lies outside of what the loss takes.
        """
        check_range(self.name, self._counted(self.target_of(batch), batch), signed=self._signed)
        return super().metric_inputs(output, batch)

    def soft_target(self, batch: Any) -> Tensor | None:
        """Return the probabilities of a yes."""
        target = self._counted(self.target_of(batch), batch)
        return (target + 1) / 2 if self._signed else target

    def predicted(self, output: Any) -> Mapping[str, Tensor]:
        """Return the output and the probability of a yes."""
        return {"output": output, "probability": self._probabilities(output)}

    def _probabilities(self, output: Tensor) -> Tensor:
        return output if isinstance(self.loss, nn.BCELoss) else output.sigmoid()


class PoissonLoss(TorchLoss):
    """PoissonNLLLoss: metrics see the rate."""

    def predictions(self, output: Any, target: Any) -> tuple[Any, ...]:
        """Return rates and counts."""
        return self.predicted(output)["output"], target

    def predicted(self, output: Any) -> Mapping[str, Tensor]:
        """Return the rate as the output."""
        return {"output": output.exp() if self.loss.log_input else output}


class GaussianLoss(TorchLoss):
    """GaussianNLLLoss of a mean and a variance: metrics see the mean."""

    outputs = ("input", "var")

    def _reduced(self, output: Any, target: Any, reduction: str) -> Tensor:
        mean, variance = self.several(output)
        self.same_shape(mean, target)
        return self._call(reduction, mean, self.like(mean, target), variance)

    def predictions(self, output: Any, target: Any) -> tuple[Any, ...]:
        """Return means and target."""
        return self.several(output)[0], target

    def predicted(self, output: Any) -> Mapping[str, Tensor]:
        """Return the mean as the output, and the variance."""
        mean, variance = self.several(output)
        return {"output": mean, "variance": variance}


class RankingLoss(TorchLoss):
    """MarginRankingLoss of two scores; the target is 1 where the first should be higher, else -1."""

    outputs = ("input1", "input2")

    def _reduced(self, output: Any, target: Any, reduction: str) -> Tensor:
        first, second = self.several(output)
        self.same_shape(first, target)
        self.same_shape(second, target)
        return self._call(reduction, first, second, self.like(first, target))

    def predictions(self, output: Any, target: Any) -> tuple[Any, ...]:
        """Return how probable it is that the first is higher, by the difference of the scores, and 1 where it should be."""
        first, second = self.several(output)
        return (first - second).sigmoid(), likelier(target, signed=True)

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
        """Return class probabilities, which cross entropy takes."""
        of_classes = target.ndim > 1 and target.shape[self._class_dim] > 1
        if self.takes_probabilities and of_classes and target.is_floating_point():
            return target
        wanted = "class numbers (an integer type)"
        raise self.wrong_target(
            target, f"{wanted} or probabilities of the output's shape" if self.takes_probabilities else wanted
        )

    @property
    def takes_probabilities(self) -> bool:
        """Tell whether a target may be the probabilities of all classes."""
        return isinstance(self.loss, nn.CrossEntropyLoss)

    def cure(self, output: Any, target: Any) -> str:
        """Say what a target is that does not fit the output."""
        if output.ndim < 2 or not output.is_floating_point():
            return "; the output must be scores in floating point, (batch, classes)"
        if not isinstance(target, Tensor):
            return ""
        classes = output.shape[self._class_dim]
        if target.is_floating_point():
            return f"; probabilities need the output's shape {tuple(output.shape)}"
        if target.shape == output.shape:
            return "; of a one-hot target give the class numbers (target.argmax(1)), or make it floating point"
        if target.ndim == output.ndim and target.shape[self._class_dim] == 1:
            return "; take the target's dimension of size 1 away (a Table's: task: classification, not binary)"
        wrong = target[(target != self._ignore_index) & ((target < 0) | (target >= classes))]
        if wrong.numel():
            return f"; the model has {classes} outputs, for the classes 0 to {classes - 1}, and a target is {int(wrong[0])}"
        return ""

    def _reduced(self, output: Any, target: Any, reduction: str) -> Tensor:
        try:
            return self._call(reduction, output, self.like(output, target) if target.is_floating_point() else target)
        except (RuntimeError, ValueError) as error:
            if output.ndim == 3 and output.shape[:2] == target.shape:
                raise ObjectiveError(
                    f"{self.name} needs classes in dimension 1, and the output is {shown(output)} for targets of "
                    f"{tuple(target.shape)}; NextTokenLoss takes classes last"
                ) from error
            raise

    def count(self, target: Any) -> float:
        """Return the targets that count, or the sum of their class weights."""
        if self._constants or target.is_floating_point():
            return float(self.counts(target).sum())
        # In NumPy: a third of what torch takes for so little.
        return float(np.count_nonzero(target.numpy() != self._ignore_index))

    def counts(self, target: Any) -> Tensor:
        """Return how much each target counts: 0 if it is ignored, else 1 or its class's weight."""
        if target.is_floating_point():
            return torch.ones((), dtype=torch.float64).expand(target.select(self._class_dim, 0).shape)
        counted: Tensor = target != self._ignore_index
        if not self._constants:
            return counted.double()
        class_weights, classes = self._constants["weight"], target.where(counted, 0)
        if classes.numel() and not 0 <= int(classes.min()) <= int(classes.max()) < len(class_weights):
            wrong = int(classes.min()) if int(classes.min()) < 0 else int(classes.max())
            raise ObjectiveError(f"{self.name} has weights for {len(class_weights)} classes, but a target is {wrong}")
        found: Tensor = class_weights[classes] * counted
        return found

    def metric_inputs(self, output: Any, batch: Any) -> tuple[Any, ...]:
        """Return probabilities (targets, classes) and class indices (targets,), ignored targets left out.

        Probabilities rather than logits, for the reason given in :class:`BinaryLoss`.
        """
        scores, target = super().metric_inputs(output.movedim(self._class_dim, -1), batch)
        scores, target = scores.flatten(0, -2), target.flatten()
        counted = target != self._ignore_index
        return self._probabilities(scores[counted]), target[counted]

    def soft_target(self, batch: Any) -> Tensor | None:
        """Return class probabilities (targets, classes); None where the target is class numbers."""
        target = self.target_of(batch)
        if not target.is_floating_point():
            return None
        return self._counted(target.movedim(self._class_dim, -1), batch).flatten(0, -2)

    def predicted(self, output: Any) -> Mapping[str, Tensor]:
        """Return the output and the classes' probabilities, both with the classes last."""
        scores = output.movedim(self._class_dim, -1)
        return {"output": scores, "probabilities": self._probabilities(scores)}

    def _probabilities(self, scores: Tensor) -> Tensor:
        return scores.exp() if isinstance(self.loss, nn.NLLLoss) else scores.softmax(-1)

    def metric_mask(self, batch: Any) -> Tensor:
        """Return which targets metrics see."""
        _, target = self.predictions(None, self.target_of(batch))
        return counted_of(target, self._ignore_index, super().metric_mask(batch))

    def predictions(self, output: Any, target: Any) -> tuple[Any, ...]:
        """Return scores, classes last, and class indices."""
        return output, target.argmax(self._class_dim) if target.is_floating_point() else target


class NextTokenLoss(ClassificationLoss):
    """Cross entropy of the next token. Output: (batch, time, vocabulary); target: (batch, time) int64.

    Args:
        ignore_index: target of positions that do not count.
        label_smoothing: share of the target spread evenly over the vocabulary.
        shift: the target is the input itself, as in Hugging Face's ``labels``: the output at one position is compared with
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
                f"{self.name} needs an output of the shape {(*target.shape, 'vocabulary')}, not {tuple(output.shape)}"
            )
        if self._shift:  # a target that does not count in place of a copy of the output that lacks the last position
            target = F.pad(target[:, 1:], (0, 1), value=self._ignore_index)
        losses = self._call(reduction, output.flatten(0, -2), target.flatten())
        return losses if reduction == "sum" else losses.view_as(target)

    def count(self, target: Any) -> float:
        """Return the targets that count."""
        return super().count(target[:, 1:] if self._shift else target)

    def counts(self, target: Any) -> Tensor:
        """Return 1 for each target that is not ignored."""
        return super().counts(F.pad(target[:, 1:], (0, 1), value=self._ignore_index) if self._shift else target)

    def predictions(self, output: Any, target: Any) -> tuple[Any, ...]:
        """Return scores and class indices, position by position."""
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
    """Return why a class cannot be an objective with these arguments, or None if it can."""
    name = loss_class.__name__
    if name in EXCLUDED and loss_class.__module__.startswith("torch."):
        return f"{name} cannot be an objective: {EXCLUDED[name]}"
    if "reduction" not in inspect.signature(loss_class).parameters:
        return f"{name} is not a loss of torch; write an Objective (docs/guides/own-model.md)"
    ours = [key for key in ("reduction", "size_average", "reduce") if key in args]
    return f"{name} sets {ours[0]}, which is the runtime's; leave it out" if ours else None


def torch_loss(loss_class: type[nn.Module], args: Mapping[str, Any]) -> Objective:
    """Make an objective of one of torch's losses; ``reduction`` is ours, and lists of class weights become tensors.

    Raises:
        ObjectiveError: the class is no loss, or one that cannot be an objective; the message says why.
    """
    refused = refusal(loss_class, args)
    if refused is not None:
        raise ObjectiveError(refused)
    tensors = {key: torch.tensor(v, dtype=torch.float64) if isinstance(v, list) else v for key, v in args.items()}
    loss = loss_class(**tensors, reduction="sum")
    for classes, objective in _OBJECTIVES:
        if isinstance(loss, classes):
            return objective(loss)
    return TorchLoss(loss)
