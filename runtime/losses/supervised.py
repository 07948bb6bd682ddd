"""Losses of a model's output and a target: the model call, per-sample weights, and the inputs of metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from runtime.errors import ObjectiveError
from runtime.losses.mismatch import first_line, no_tensor, target_name, wrong_target
from runtime.objective import Loss, Objective, describe, full_precision

TargetIs = Literal["values", "classes", "anything"]

_SHAPE_AND_TYPE_ERRORS = (RuntimeError, ValueError, IndexError, TypeError)


class SupervisedObjective(Objective):
    """Base class of losses of the model's output and a target, which :class:`runtime.data.fields.Fields` finds in the batch.

    A subclass implements ``losses``, the unreduced losses, and ``counts``, the count of each; optionally a faster
    ``loss_sum`` or ``count``. A sample's weight (``data.fields.weight``) multiplies its losses *and* their counts, so that a
    sample of weight 2 has the effect of two copies.

    Attributes:
        outputs: names of the tensors that the loss takes from the model, if more than one.
        has_target: whether the batch has a target.
        target_is: ``values``: a tensor of numbers; ``classes``: a tensor of class numbers, of any integer type;
            ``anything``: not checked here.
    """

    unit = "elements"
    reads_sample_weights = True
    outputs: Sequence[str] = ()
    has_target = True
    target_is: TargetIs = "anything"

    @property
    def name(self) -> str:
        """Name of the loss in messages."""
        return type(self).__name__

    def forward(self, model: nn.Module, batch: Any) -> Loss:
        """Call the model on the inputs, and the loss on its output and the target."""
        positional, named = self.fields.arguments(batch)
        return self.loss_of(model(*positional, **named), batch)

    def loss_of(self, returned: Any, batch: Any) -> Loss:
        """Return the loss, given the return value of the model.

        Raises:
            ObjectiveError: output and target do not fit each other or the loss.
        """
        fields = self.fields
        output = fields.output_of(returned)  # not in float32: that copy would be held until the end of the step
        target = self.target_of(batch)
        if not self.outputs and not isinstance(output, Tensor):
            raise no_tensor(self.name, output)
        float_output = full_precision(output)
        try:
            if fields.weight is None:
                return Loss(self.loss_sum(float_output, target), output=output)
            losses = self.losses(float_output, target)
            weights = spread(fields.weight_of(batch), losses.shape)
            return Loss((losses * weights.to(losses.dtype)).sum(), output=output)
        except _SHAPE_AND_TYPE_ERRORS as error:
            raise ObjectiveError(
                f"{self.name} refused the model's output ({describe(output)}) and the target ({target_name(self.fields)}: "
                f"{describe(target)}): {first_line(error)}{self.hint(output, target)}"
            ) from error

    def target_of(self, batch: Any) -> Any:
        """Return the batch's target, class numbers as int64; None if the loss has none.

        Raises:
            ObjectiveError: the target has the wrong type.
        """
        if not self.has_target:
            return None
        target = self.fields.target_of(batch)
        return target if self.target_is == "anything" else self._checked(target)

    def _checked(self, target: Any) -> Tensor:
        classes = self.target_is == "classes"
        if not isinstance(target, Tensor):
            raise self.wrong_target(target)
        if not classes or target.dtype == torch.int64:
            return target
        if target.is_floating_point() or target.is_complex():
            return self.fractions(target)
        return target.long()  # uint8 cannot represent -100, and torch takes no other integers

    def fractions(self, target: Tensor) -> Tensor:
        """Accept or reject a floating-point target where class numbers are expected.

        Raises:
            ObjectiveError: always, unless a subclass accepts it.
        """
        raise self.wrong_target(target)

    def wrong_target(self, target: Any, wanted: str = "") -> ObjectiveError:
        """Return an error for a target of the wrong type."""
        return wrong_target(self.name, target, self.fields, classes=self.target_is == "classes", wanted=wanted)

    def hint(self, output: Any, target: Any) -> str:
        """Return how to fix an output and a target that do not fit, as the end of a message; empty if unknown."""
        return ""

    def losses(self, output: Any, target: Any) -> Tensor:
        """Return the unreduced losses, in the shape of ``counts``."""
        raise NotImplementedError

    def loss_sum(self, output: Any, target: Any) -> Tensor:
        """Return the sum of the losses."""
        return self.losses(output, target).sum()

    def counts(self, target: Any) -> Tensor:
        """Return the count of each loss, on the CPU. Default: 1 for every element of the target."""
        return torch.ones((), dtype=torch.float64).expand(target.shape)

    def count(self, target: Any) -> float:
        """Return the sum of ``counts``."""
        return float(target.numel())

    def weight(self, batch: Any) -> float:
        """Return the sum of all counts, each times its sample's weight."""
        target = self.target_of(batch)
        if self.fields.weight is None:
            return self.count(target)
        counts = self.counts(target)
        return float((spread(sample_weights(self.fields.weight_of(batch)), counts.shape) * counts).sum())

    def metric_inputs(self, output: Any, batch: Any) -> tuple[Any, ...]:
        """Return predictions and target, without those of weight 0. Metrics do not receive the other weights."""
        inputs = self.predictions(output, self.target_of(batch))
        return tuple(self._counted(value, batch) for value in inputs)

    def _counted(self, value: Tensor, batch: Any) -> Tensor:
        """Drop the samples, or elements, whose weight is 0."""
        if self.fields.weight is None:
            return value
        return value[spread(self.fields.weight_of(batch) != 0, value.shape, widen=False)]

    def metric_mask(self, batch: Any) -> Tensor | None:
        """Return a mask of the samples, or elements of the target, whose weight is not 0; None if all."""
        if self.fields.weight is None or not self.has_target:
            return None
        return spread(self.fields.weight_of(batch) != 0, self.target_of(batch).shape, widen=False)

    def predictions(self, output: Any, target: Any) -> tuple[Any, ...]:
        """Return the metrics' inputs before masking; the first dimension of each is samples."""
        return output, target

    def output_tensors(self, output: Any) -> Sequence[Tensor]:
        """Return the tensors that the loss takes from the model, in the order of ``outputs``."""
        if isinstance(output, Mapping):
            tensors: Sequence[Any] = [output.get(name) for name in self.outputs]
        else:
            tensors = output if isinstance(output, list | tuple) else ()
        if len(tensors) != len(self.outputs) or not all(isinstance(value, Tensor) for value in tensors):
            raise ObjectiveError(
                f"{self.name} takes {len(self.outputs)} tensors from the model ({', '.join(self.outputs)}), as a tuple or a "
                f"mapping with these keys, not {describe(output)}"
            )
        return tensors

    def same_shape(self, output: Tensor, target: Tensor) -> None:
        """Reject shapes that torch would broadcast.

        Raises:
            ObjectiveError: the shapes differ.
        """
        if output.shape != target.shape:
            squeeze = " (output.squeeze(-1))" if output.shape == (*target.shape, 1) else ""
            raise ObjectiveError(
                f"{self.name} needs an output of the target's shape {tuple(target.shape)}, not {tuple(output.shape)}; torch "
                "would broadcast and sum over pairs that do not belong together. Let the model return that shape"
                f"{squeeze}, let the data set give a target of the output's shape, or name another target "
                f"({target_name(self.fields)})"
            )


class PerSampleObjective(SupervisedObjective):
    """Base class of losses with exactly one value per sample: ``losses`` has shape (batch,)."""

    unit = "samples"

    @property
    def counts_samples(self) -> bool:
        """Whether the weight is the number of samples: if there are no sample weights."""
        return self.fields.weight is None

    def weight(self, batch: Any) -> float:
        """Return the sum of the samples' weights."""
        weights = sample_weights(self.fields.weight_of(batch))
        return float(spread(weights, weights.shape[:1]).sum())


def counted_mask(target: Tensor, ignore_index: int, mask: Tensor | None) -> Tensor:
    """Return a mask of the targets that are neither ``ignore_index`` nor excluded by a mask of samples or targets."""
    counted = target != ignore_index
    return counted if mask is None else counted & spread(mask, target.shape)


def sample_weights(weights: Any) -> Tensor:
    """Return a batch's weights in float64.

    Raises:
        ObjectiveError: they are not a tensor, or one is negative or NaN.
    """
    if not isinstance(weights, Tensor):
        raise ObjectiveError(f"data.fields.weight must be a tensor in the batch, not {describe(weights)}")
    if weights.numel() and not bool((weights >= 0).all()):
        raise ObjectiveError("data.fields.weight: a weight is negative or NaN")
    return weights.double()


def spread(weights: Tensor, shape: torch.Size, *, widen: bool = True) -> Tensor:
    """Return weights of samples, or of elements, reshaped to broadcast over losses of shape ``shape``.

    Args:
        weights: in the shape of the first dimensions of ``shape``; trailing dimensions of size 1 are dropped.
        widen: append dimensions of size 1 up to ``len(shape)``.

    Raises:
        ObjectiveError: the weights have another shape.
    """
    while weights.ndim > 1 and weights.shape[-1] == 1:
        weights = weights.squeeze(-1)
    if weights.ndim == 0 or weights.shape != shape[: weights.ndim]:
        raise ObjectiveError(
            f"data.fields.weight has shape {tuple(weights.shape)}, but the losses have {tuple(shape)}; give one weight for "
            "each sample, or one for each loss"
        )
    return weights.view(*weights.shape, *[1] * (len(shape) - weights.ndim)) if widen else weights
