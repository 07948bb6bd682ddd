"""Losses of a model's output and a target: the call of the model, per-sample weights, and what metrics are shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from runtime.errors import ObjectiveError
from runtime.losses.mismatch import first_line, no_tensor, target_name, wrong_target
from runtime.objective import Loss, Objective, full_precision, shown

TargetIs = Literal["values", "classes", "anything"]

_REFUSALS = (RuntimeError, ValueError, IndexError, TypeError)


class SupervisedObjective(Objective):
    """Base of losses of the model's output and a target, which :class:`runtime.data.fields.Fields` finds in the batch.

    A subclass implements ``losses``, one for each thing that counts, and ``counts``, how much each of them counts; a faster
    ``loss_sum`` or ``count`` where there is one. A sample's weight (``data.fields.weight``) multiplies its losses *and* what
    they count, so that a sample of weight 2 counts as if it were there twice.

    Attributes:
        outputs: names of what the loss takes from the model, where that is more than one tensor.
        has_target: whether the batch has a target.
        target_is: ``values``: a tensor of numbers; ``classes``: one of class numbers, which may be of any integer type;
            ``anything``: whatever the subclass makes of it.
    """

    unit = "elements"
    reads_sample_weights = True
    outputs: Sequence[str] = ()
    has_target = True
    target_is: TargetIs = "anything"

    @property
    def name(self) -> str:
        """What messages call the loss."""
        return type(self).__name__

    def forward(self, model: nn.Module, batch: Any) -> Loss:
        """Call the model on the inputs, and the loss on its output and the target."""
        positional, named = self.fields.arguments(batch)
        return self.compared(model(*positional, **named), batch)

    def compared(self, returned: Any, batch: Any) -> Loss:
        """Return the loss of what the model returned.

        Raises:
            ObjectiveError: output and target do not fit each other or the loss.
        """
        fields = self.fields
        output = fields.output_of(
            returned
        )  # as the model gave it: a copy in float32 would be held until the step's end
        target = self.target_of(batch)
        if not self.outputs and not isinstance(output, Tensor):
            raise no_tensor(self.name, output)
        compared = full_precision(output)
        try:
            if fields.weight is None:
                return Loss(self.loss_sum(compared, target), output=output)
            losses = self.losses(compared, target)
            weights = spread(fields.weight_of(batch), losses.shape)
            return Loss((losses * weights.to(losses.dtype)).sum(), output=output)
        except _REFUSALS as error:
            raise ObjectiveError(
                f"{self.name} refused the model's output ({shown(output)}) and the target ({target_name(self.fields)}: "
                f"{shown(target)}): {first_line(error)}{self.cure(output, target)}"
            ) from error

    def target_of(self, batch: Any) -> Any:
        """Return the batch's target, class numbers as int64; None if the loss has none.

        Raises:
            ObjectiveError: it is not what the loss compares with.
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
        return target.long()  # uint8 knows no -100, and torch takes no other integers

    def fractions(self, target: Tensor) -> Tensor:
        """Return a target in floating point where class numbers are expected.

        Raises:
            ObjectiveError: unless a subclass knows what it means.
        """
        raise self.wrong_target(target)

    def wrong_target(self, target: Any, wanted: str = "") -> ObjectiveError:
        """Make an error of a target that is not what the loss compares with."""
        return wrong_target(self.name, target, self.fields, classes=self.target_is == "classes", wanted=wanted)

    def cure(self, output: Any, target: Any) -> str:
        """Return what to do about an output and a target that do not fit, as the end of a message; empty if unknown."""
        return ""

    def losses(self, output: Any, target: Any) -> Tensor:
        """Return the losses one by one, of the shape of ``counts``."""
        raise NotImplementedError

    def loss_sum(self, output: Any, target: Any) -> Tensor:
        """Return the sum of the losses."""
        return self.losses(output, target).sum()

    def counts(self, target: Any) -> Tensor:
        """Return how much each loss counts; on the CPU. Default: every element of the target counts 1."""
        return torch.ones((), dtype=torch.float64).expand(target.shape)

    def count(self, target: Any) -> float:
        """Return the sum of ``counts``."""
        return float(target.numel())

    def weight(self, batch: Any) -> float:
        """Return the sum over the losses of what each counts, times its sample's weight."""
        target = self.target_of(batch)
        if self.fields.weight is None:
            return self.count(target)
        counts = self.counts(target)
        return float((spread(sample_weights(self.fields.weight_of(batch)), counts.shape) * counts).sum())

    def metric_inputs(self, output: Any, batch: Any) -> tuple[Any, ...]:
        """Return predictions and target, what does not count left out. Metrics do not see the weights of what does."""
        inputs = self.predictions(output, self.target_of(batch))
        return tuple(self._counted(value, batch) for value in inputs)

    def _counted(self, value: Tensor, batch: Any) -> Tensor:
        """Leave out the samples, or elements, whose weight is 0."""
        if self.fields.weight is None:
            return value
        return value[spread(self.fields.weight_of(batch) != 0, value.shape, widen=False)]

    def metric_mask(self, batch: Any) -> Tensor | None:
        """Return which samples, or elements of the target, metrics see: those whose weight is not 0; None if it is all."""
        if self.fields.weight is None or not self.has_target:
            return None
        return spread(self.fields.weight_of(batch) != 0, self.target_of(batch).shape, widen=False)

    def predictions(self, output: Any, target: Any) -> tuple[Any, ...]:
        """Return what metrics are updated with; samples in the first dimension of each."""
        return output, target

    def several(self, output: Any) -> Sequence[Tensor]:
        """Return what the loss takes from the model, in the order of ``outputs``."""
        if isinstance(output, Mapping):
            found: Sequence[Any] = [output.get(name) for name in self.outputs]
        else:
            found = output if isinstance(output, list | tuple) else ()
        if len(found) != len(self.outputs) or not all(isinstance(value, Tensor) for value in found):
            raise ObjectiveError(
                f"{self.name} takes {len(self.outputs)} tensors from the model ({', '.join(self.outputs)}), as a tuple or a "
                f"mapping with these keys, not {shown(output)}"
            )
        return found

    def same_shape(self, output: Tensor, target: Tensor) -> None:
        """Refuse what torch would broadcast.

        Raises:
            ObjectiveError: the shapes differ.
        """
        if output.shape != target.shape:
            one_more = " (output.squeeze(-1))" if output.shape == (*target.shape, 1) else ""
            raise ObjectiveError(
                f"{self.name} needs an output of the target's shape {tuple(target.shape)}, not {tuple(output.shape)}; torch "
                "would broadcast and sum over pairs that do not belong together. Let the model return that shape"
                f"{one_more}, the data give a target of the output's, or name another target ({target_name(self.fields)})"
            )


class PerSampleObjective(SupervisedObjective):
    """Base of losses of which each sample has exactly one: ``losses`` has the shape (batch,)."""

    unit = "samples"

    @property
    def counts_samples(self) -> bool:
        """Tell whether the weight is the number of samples: where they have no weights of their own."""
        return self.fields.weight is None

    def weight(self, batch: Any) -> float:
        """Return the sum of the samples' weights."""
        weights = sample_weights(self.fields.weight_of(batch))
        return float(spread(weights, weights.shape[:1]).sum())


def counted_of(target: Tensor, ignored: int, of_samples: Tensor | None) -> Tensor:
    """Return which targets are neither ignored nor left out by what a mask says of samples or of targets."""
    counted = target != ignored
    return counted if of_samples is None else counted & spread(of_samples, target.shape)


def sample_weights(weights: Any) -> Tensor:
    """Return a batch's weights in float64.

    Raises:
        ObjectiveError: they are no tensor, or one is negative or not a number.
    """
    if not isinstance(weights, Tensor):
        raise ObjectiveError(f"data.fields.weight must be a tensor in the batch, not {shown(weights)}")
    if weights.numel() and not bool((weights >= 0).all()):
        raise ObjectiveError("data.fields.weight: a weight is negative or not a number")
    return weights.double()


def spread(weights: Tensor, shape: torch.Size, *, widen: bool = True) -> Tensor:
    """Return weights of samples, or of elements, so that they multiply losses of a shape.

    Args:
        weights: of the first dimensions of ``shape``; dimensions of size 1 behind them do not count.
        widen: add dimensions of size 1 up to the number that ``shape`` has.

    Raises:
        ObjectiveError: the weights are of another shape.
    """
    while weights.ndim > 1 and weights.shape[-1] == 1:
        weights = weights.squeeze(-1)
    if weights.ndim == 0 or weights.shape != shape[: weights.ndim]:
        raise ObjectiveError(
            f"data.fields.weight has the shape {tuple(weights.shape)}, but what it weighs has {tuple(shape)}; give one weight "
            "for each sample, or one for each loss"
        )
    return weights.view(*weights.shape, *[1] * (len(shape) - weights.ndim)) if widen else weights
