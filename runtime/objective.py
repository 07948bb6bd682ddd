"""What is minimised: a loss sum and the weight it is divided by, kept apart so that a global batch stays one batch.

An objective returns the *sum* of its losses over a microbatch. The runtime divides by the weight of the whole global
batch, which it knows before the first forward pass. Torch's losses are taken by name; their weights are those of torch's
own ``reduction="mean"`` on the whole batch:

==========================================  ============================================================
loss                                        weight
==========================================  ============================================================
CrossEntropyLoss, NLLLoss                   targets that are not ``ignore_index``, or their class weights
NextTokenLoss                               tokens whose target is not ``ignore_index``
the other losses of torch                   elements of the target
==========================================  ============================================================
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from runtime.component import described
from runtime.errors import ObjectiveError
from runtime.fields import Fields

_RESERVED = ("loss", "weight", "samples")


class Loss(NamedTuple):
    """What one forward pass returns.

    Args:
        sum: sum of the losses over the microbatch, a scalar with a gradient.
        parts: named addends, as sums like ``sum``, without a gradient; reported divided by the weight.
        output: what the model returned, for metrics.
    """

    sum: Tensor
    parts: Mapping[str, Tensor] = {}
    output: Any = None


class Objective(nn.Module):
    """Base of objectives. Parameters of its own are trained, saved and reduced with the model's.

    A subclass implements ``forward``, and ``weight`` where that is not the number of samples. It may call any method of
    the model any number of times.

    Attributes:
        unit: what the weight counts, in the plural, for reports.
        couples_samples: the loss of a sample depends on the others of its microbatch, so the result depends on K.
        fields: which part of a batch is what; the configuration's ``data.fields``.
    """

    unit = "samples"
    couples_samples = False
    fields = Fields()

    def forward(self, model: nn.Module, batch: Any) -> Loss | Tensor:
        """Return the loss of a microbatch, or its sum alone."""
        raise ObjectiveError(f"{type(self).__name__} has no forward(model, batch)")

    def weight(self, batch: Any) -> float | Tensor:
        """Return the weight of a microbatch, on the CPU and before any forward pass. Default: its samples."""
        raise TypeError("the number of samples is known without asking")

    def checked_weight(self, batch: Any) -> float:
        """Return the weight as a number.

        Raises:
            ObjectiveError: it is negative or not finite, or ``weight`` raised.
        """
        try:
            weight = float(self.weight(batch))
        except ObjectiveError:
            raise
        except Exception as error:
            raise ObjectiveError(f"{type(self).__name__}.weight raised {described(error)}") from error
        if not 0 <= weight < math.inf:
            raise ObjectiveError(f"{type(self).__name__}.weight is {weight}; it must be finite and not negative")
        return weight

    def metric_inputs(self, output: Any, batch: Any) -> tuple[Any, ...]:
        """Return the arguments of the metrics' ``update``: predictions and target, masked elements left out."""
        return output, self.fields.target_of(batch)

    def predictions(self, output: Any) -> Mapping[str, Tensor]:
        """Return what can be written of the model's output, by name; one row a sample.

        Without a target, so that data of which nothing is known can be predicted. ``probabilities``: (batch, classes), one
        class is right; ``probability``: (batch,) or (batch, labels), of a yes; from these ``class`` and the best classes
        follow. Any other name can be written too.
        """
        return {"output": output}

    @property
    def counts_samples(self) -> bool:
        """Tell whether the weight is the number of samples, which the order tells without reading data."""
        return type(self).weight is Objective.weight


class TrainingModule(nn.Module):
    """Model and objective as the one module that a strategy prepares."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self.objective = objective

    def forward(self, batch: Any, filler: bool = False) -> Loss:
        """Return the loss of a microbatch; for a filler a zero that reaches every trainable parameter.

        Raises:
            ObjectiveError: the objective returned something else than a scalar sum.
        """
        loss = self.objective.forward(self.model, batch)
        if filler:
            trainable = [p for p in self.parameters() if p.requires_grad]
            return Loss(_Zero.apply(*trainable))  # type: ignore[no-untyped-call]
        if isinstance(loss, Tensor):
            loss = Loss(loss)
        found = loss.sum if isinstance(loss, Loss) else loss
        if not isinstance(loss, Loss) or not isinstance(found, Tensor) or found.ndim != 0:
            got = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise ObjectiveError(
                f"{type(self.objective).__name__} must return the sum of its losses, a scalar or runtime.objective.Loss, "
                f"not {got}; with torch's losses use reduction='sum'"
            )
        for name, part in loss.parts.items():
            if name in _RESERVED:
                raise ObjectiveError(
                    f"{type(self.objective).__name__}: a part cannot be called {name!r}, which reports have a figure of already"
                )
            if not isinstance(part, Tensor) or part.ndim != 0:
                raise ObjectiveError(
                    f"{type(self.objective).__name__}: part {name!r} must be a scalar tensor, a sum like the loss"
                )
        if torch.is_grad_enabled() and not found.requires_grad:
            raise ObjectiveError(
                f"{type(self.objective).__name__} returned a sum without a gradient: no trainable parameter leads to it"
            )
        return loss


class _Zero(torch.autograd.Function):
    """A zero with a zero gradient for every parameter, whatever the parameters or a loss hold: 0 * inf would be NaN."""

    @staticmethod
    def forward(ctx: Any, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return tuple(torch.zeros_like(parameter) for parameter in ctx.saved_tensors)


class SupervisedObjective(Objective):
    """A loss of the model's output and a target.

    Inputs and target are found by :class:`runtime.fields.Fields`; mapped or listed inputs become the model's arguments.
    """

    unit = "elements"

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, model: nn.Module, batch: Any) -> Loss:
        """Call the model on the inputs and the loss on its output and the target."""
        positional, named = self.fields.arguments(batch)
        output, target = self.fields.output_of(model(*positional, **named)), self.fields.target_of(batch)
        try:
            loss_sum = self._loss_sum(output, target)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            shapes = ", ".join(_shown(value) for value in (output, target))
            raise ObjectiveError(
                f"{type(self.loss).__name__} refused the model's output and the target ({shapes}): {error}"
            ) from error
        return Loss(loss_sum, output=output)

    def _loss_sum(self, output: Tensor, target: Tensor) -> Tensor:
        if output.shape != target.shape:
            raise ObjectiveError(
                f"{type(self.loss).__name__} needs an output of the target's shape {tuple(target.shape)}, "
                f"not {tuple(output.shape)}; torch would broadcast and sum over pairs that do not belong together"
            )
        loss_sum: Tensor = self.loss(output, target)
        return loss_sum

    def weight(self, batch: Any) -> float:
        """Return the number of elements of the target."""
        return float(self.fields.target_of(batch).numel())


class BinaryObjective(SupervisedObjective):
    """Binary cross entropy; metrics see probabilities."""

    def metric_inputs(self, output: Any, batch: Any) -> tuple[Tensor, Tensor]:
        """Return probabilities and integer targets.

        torchmetrics takes scores within [0, 1] for probabilities and applies a sigmoid otherwise, batch by batch: on
        logits its result would depend on how the data is cut.
        """
        return self._probabilities(output), self.fields.target_of(batch).long()

    def predictions(self, output: Any) -> Mapping[str, Tensor]:
        """Return the output and the probability of a yes."""
        return {"output": output, "probability": self._probabilities(output)}

    def _probabilities(self, output: Tensor) -> Tensor:
        return output.sigmoid() if isinstance(self.loss, nn.BCEWithLogitsLoss) else output


class ClassificationObjective(SupervisedObjective):
    """CrossEntropyLoss or NLLLoss: class indices or, for cross entropy, class probabilities as target.

    Output: (batch, classes, …); target: (batch, …) int64, or of the output's shape in floating point.
    """

    unit = "targets"
    _class_dim = 1

    def __init__(self, loss: nn.CrossEntropyLoss | nn.NLLLoss) -> None:
        super().__init__(loss)
        self._ignore_index = loss.ignore_index
        # The weight is wanted on the CPU, before the batch is moved; the loss's own copy moves with the module.
        self._class_weights = None if loss.weight is None else loss.weight.detach().clone()

    def weight(self, batch: Any) -> float:
        """Return the targets that count, or the sum of their class weights."""
        target = self.fields.target_of(batch)
        if target.is_floating_point():
            return float(target.numel() // target.shape[self._class_dim])
        if self._class_weights is None:  # in NumPy: a third of what torch takes for so little
            return float(np.count_nonzero(target.numpy() != self._ignore_index))
        counted = target != self._ignore_index
        classes, largest = len(self._class_weights), int(target[counted].max()) if counted.any() else 0
        if largest >= classes:
            raise ObjectiveError(
                f"{type(self.loss).__name__} has weights for {classes} classes, but a target is {largest}"
            )
        return float(self._class_weights.double()[target[counted]].sum())

    def _loss_sum(self, output: Tensor, target: Tensor) -> Tensor:
        loss_sum: Tensor = self.loss(output, target)
        return loss_sum

    def metric_inputs(self, output: Any, batch: Any) -> tuple[Tensor, Tensor]:
        """Return probabilities (targets, classes) and class indices (targets,), ignored targets left out.

        Probabilities rather than logits, for the reason given in :meth:`BinaryObjective.metric_inputs`.
        """
        target = self.fields.target_of(batch)
        scores = output.movedim(self._class_dim, -1).flatten(0, -2)
        if target.is_floating_point():
            target = target.movedim(self._class_dim, -1).argmax(-1)
        target = target.flatten()
        counted = target != self._ignore_index
        return self._probabilities(scores[counted]), target[counted]

    def predictions(self, output: Any) -> Mapping[str, Tensor]:
        """Return the output and the classes' probabilities, both with the classes last."""
        scores = output.movedim(self._class_dim, -1)
        return {"output": scores, "probabilities": self._probabilities(scores)}

    def _probabilities(self, scores: Tensor) -> Tensor:
        scores = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
        return scores.exp() if isinstance(self.loss, nn.NLLLoss) else scores.softmax(-1)


class NextTokenLoss(ClassificationObjective):
    """Cross entropy of the next token. Output: (batch, time, vocabulary); target: (batch, time) int64.

    Args:
        ignore_index: target of positions that do not count.
        label_smoothing: share of the target spread evenly over the vocabulary.
    """

    unit = "tokens"
    _class_dim = -1

    def __init__(self, ignore_index: int = -100, label_smoothing: float = 0.0) -> None:
        super().__init__(
            nn.CrossEntropyLoss(ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="sum")
        )

    def _loss_sum(self, output: Tensor, target: Tensor) -> Tensor:
        loss_sum: Tensor = self.loss(output.flatten(0, -2), target.flatten())
        return loss_sum


_OTHER_INPUTS = (  # their input is not (output, target) of one shape
    nn.CosineEmbeddingLoss,
    nn.MarginRankingLoss,
    nn.GaussianNLLLoss,
    nn.TripletMarginLoss,
    nn.TripletMarginWithDistanceLoss,
    nn.MultiMarginLoss,
    nn.MultiLabelMarginLoss,
    nn.MultiLabelSoftMarginLoss,
    nn.CTCLoss,
)


def torch_loss(loss_class: type[nn.Module], args: Mapping[str, Any]) -> Objective:
    """Make an objective of one of torch's losses; ``reduction`` is ours, and lists of class weights become tensors.

    Raises:
        ObjectiveError: the class is no loss, or one whose batch is not (inputs, target).
    """
    if not (inspect.isclass(loss_class) and "reduction" in inspect.signature(loss_class).parameters):
        raise ObjectiveError(f"{loss_class.__name__} is not a loss of torch")
    if loss_class in _OTHER_INPUTS or "reduction" in args:
        what = "sets reduction, which is the runtime's" if "reduction" in args else "takes more than output and target"
        raise ObjectiveError(f"{loss_class.__name__} {what}; write an Objective (README, 'Your own objective')")
    tensors = {key: torch.tensor(value) if isinstance(value, list) else value for key, value in args.items()}
    loss = loss_class(**tensors, reduction="sum")
    if isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss):
        return ClassificationObjective(loss)
    if isinstance(loss, nn.BCELoss | nn.BCEWithLogitsLoss):
        return BinaryObjective(loss)
    return SupervisedObjective(loss)


def _shown(value: Any) -> str:
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
