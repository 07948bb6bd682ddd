"""The loss contract: loss sum and weight (its divisor) are kept separate, so that splitting a global batch changes nothing.

An objective returns the *sum* of its losses over a microbatch. The runtime divides by the weight of the whole global
batch, which it knows before the first forward pass. The table in ``losses/by_name.py`` lists what each loss counts.

An objective may have several sums, each with its own weight (:class:`runtime.losses.weighted_sum.WeightedSum`): then both
are one-dimensional, and the sum of the quotients is minimised.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from runtime.config.component import described
from runtime.data.fields import Fields
from runtime.errors import ObjectiveError
from runtime.model_calls import explained

_RESERVED = ("loss", "weight", "samples")

Weight = float | tuple[float, ...]
"""Divisor of a loss sum; one number per sum where an objective has several."""


class Loss(NamedTuple):
    """Result of one forward pass.

    Attributes:
        sum: sum of the losses over the microbatch, a scalar with a gradient; (weights,) if there are several weights.
        parts: named addends, sums like ``sum``, without a gradient; reported divided by the weight.
        output: output of the model, for metrics.
    """

    sum: Tensor
    parts: Mapping[str, Tensor] = {}
    output: Any = None


class Objective(nn.Module):
    """Base class of objectives. Its parameters, if any, are trained, saved and reduced with the model's.

    A subclass implements ``forward``, and ``weight`` unless that is the number of samples. It may call any method of the
    model any number of times.

    Attributes:
        unit: what the weight counts, in the plural, for reports.
        couples_samples: the loss of a sample depends on the others of its microbatch, so the result depends on K.
        reads_sample_weights: ``forward`` and ``weight`` take ``fields.weight_of(batch)`` into account; if False,
            ``data.fields.weight`` is rejected.
        num_weights: number of sums and weights; None: one scalar.
        fields: roles of a batch's parts; the configuration's ``data.fields``.
    """

    unit = "samples"
    couples_samples = False
    reads_sample_weights = False
    num_weights: int | None = None
    fields = Fields()

    def forward(self, model: nn.Module, batch: Any) -> Loss | Tensor:
        """Return the loss of a microbatch, or only its sum."""
        raise ObjectiveError(f"{type(self).__name__} has no forward(model, batch)")

    def weight(self, batch: Any) -> float | Tensor:
        """Return the weight of a microbatch; called with CPU tensors before any forward pass. Default: number of samples."""
        raise TypeError("the number of samples is known without calling weight()")

    def checked_weight(self, batch: Any, samples: int) -> Weight:
        """Return the weight of a microbatch of ``samples`` samples: one number, or one per sum.

        Raises:
            ObjectiveError: the weight is negative or not finite, or ``weight`` raised.
        """
        if self.counts_samples:
            return float(samples)
        try:
            weight = float(self.weight(batch))
        except ObjectiveError:
            raise
        except Exception as error:
            raise ObjectiveError(f"{type(self).__name__}.weight raised {described(error)}") from error
        if not 0 <= weight < math.inf:
            raise ObjectiveError(f"{type(self).__name__}.weight is {weight}; it must be finite and not negative")
        return weight

    def means(self, sums: Mapping[str, float], weight: Weight) -> dict[str, float]:
        """Return the mean loss and its mean parts, given their sums over a set of samples and that set's weight."""
        assert isinstance(weight, float)
        return {name: total / weight for name, total in sums.items()} if weight > 0 else {}

    def metric_inputs(self, output: Any, batch: Any) -> tuple[Any, ...]:
        """Return the arguments of the metrics' ``update``: predictions and target, without masked elements."""
        return output, self.fields.target_of(batch)

    def soft_target(self, batch: Any) -> Tensor | None:
        """Return the soft target that ``metric_inputs`` turned into classes, without masked elements.

        For metrics of values, such as a mean squared error; metrics of classes see the classes. None: the target is not soft.
        """
        return None

    def predicted(self, output: Any) -> Mapping[str, Tensor]:
        """Return the predictions that ``lockstep predict`` can write, by name; one row per sample.

        Needs no target, so unlabelled data can be predicted. ``probabilities``: (batch, classes), for exclusive classes;
        ``probability``: (batch,) or (batch, labels), of the positive class; ``class`` and the top classes are derived from
        these. Any other name can be written too.
        """
        return {"output": output}

    def metric_mask(self, batch: Any) -> Tensor | None:
        """Return a mask, in the target's shape, of the elements that ``metric_inputs`` keeps; None if it keeps all."""
        return None

    @property
    def counts_samples(self) -> bool:
        """Whether the weight is the number of samples, which is known without reading data."""
        return type(self).weight is Objective.weight


class ModelCall(NamedTuple):
    """Passed in place of a batch to call the model alone.

    For strategies that need every call to go through the root of the wrapped module.
    """

    positional: tuple[Any, ...]
    named: dict[str, Any]


class TrainingModule(nn.Module):
    """Model and objective as one module for a strategy to wrap.

    Attributes:
        frozen: submodules that stay in evaluation mode.
        silent_fillers: whether fillers give parameters no gradient instead of zeros. Without a gradient a parameter stays as
            it is; on a zero gradient an optimizer still makes an update (weight decay, momentum).
    """

    frozen: Sequence[nn.Module] = ()
    silent_fillers = False

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self.objective = objective

    def train(self, mode: bool = True) -> Self:
        """Set training or evaluation mode, except for frozen parts."""
        super().train(mode)
        for part in self.frozen:
            part.eval()
        return self

    def forward(self, batch: Any, filler: bool = False) -> Loss:
        """Return the loss of a microbatch; for a filler, a zero connected to every trainable parameter.

        Raises:
            ObjectiveError: the objective returned something other than a scalar sum.
            ForwardError: model or objective raised.
        """
        if isinstance(batch, ModelCall):
            return self.model(*batch.positional, **batch.named)  # type: ignore[no-any-return]
        try:
            loss = self.objective.forward(self.model, batch)
        except Exception as error:
            forward_error = explained(error, self, describe(batch))
            if forward_error is None:
                raise
            raise forward_error from error
        if filler:
            trainable = [p for p in self.parameters() if p.requires_grad]
            return Loss(_Zero.apply(self.silent_fillers, *trainable))  # type: ignore[no-untyped-call]
        if isinstance(loss, Tensor):
            loss = Loss(loss)
        loss_sum = loss.sum if isinstance(loss, Loss) else loss
        dimensions = 0 if self.objective.num_weights is None else 1
        if not isinstance(loss, Loss) or not isinstance(loss_sum, Tensor) or loss_sum.ndim != dimensions:
            got = (
                f"a tensor of shape {tuple(loss_sum.shape)}"
                if isinstance(loss_sum, Tensor)
                else type(loss_sum).__name__
            )
            raise ObjectiveError(
                f"{type(self.objective).__name__} must return the sum of its losses, a scalar or runtime.objective.Loss, "
                f"not {got}; with torch's losses use reduction='sum'"
            )
        if not loss_sum.is_floating_point():
            raise ObjectiveError(
                f"{type(self.objective).__name__} returned a sum in {dtype_name(loss_sum.dtype)}, but a loss must be a real "
                "floating-point number: take .abs() or .real of complex outputs, and convert integers with .float()"
            )
        if loss.parts:
            self._check_parts(loss.parts)
        if not loss_sum.requires_grad and torch.is_grad_enabled():
            raise ObjectiveError(
                f"{type(self.objective).__name__} returned a sum without a gradient: it depends on no trainable parameter"
            )
        return loss

    def _check_parts(self, parts: Mapping[str, Tensor]) -> None:
        for name, part in parts.items():
            if name in _RESERVED:
                raise ObjectiveError(
                    f"{type(self.objective).__name__}: a part cannot be called {name!r}, a name that reports already use"
                )
            if not isinstance(part, Tensor) or part.ndim != 0:
                raise ObjectiveError(
                    f"{type(self.objective).__name__}: part {name!r} must be a scalar tensor, a sum like the loss"
                )


class _Zero(torch.autograd.Function):
    """A zero connected to every parameter, whatever values they or a loss hold: 0 * inf would be NaN.

    Args:
        silent: give the parameters no gradient at all, instead of zeros.
    """

    @staticmethod
    def forward(ctx: Any, silent: bool, *parameters: Tensor) -> Tensor:
        ctx.silent = silent
        ctx.save_for_backward(*parameters)
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return None, *(None if ctx.silent else torch.zeros_like(parameter) for parameter in ctx.saved_tensors)


def add_weights(first: Weight, second: Weight) -> Weight:
    """Return the weight of two sets of samples together; ``first`` may be 0.0, the weight of an empty set."""
    if isinstance(second, tuple):
        return tuple(a + b for a, b in zip(first, second, strict=True)) if isinstance(first, tuple) else second
    assert isinstance(first, float)
    return first + second


def starting_gradient(loss_sum: Tensor, weight: Weight, *, scale: float = 1.0) -> Tensor:
    """Return the ``gradient`` argument with which a loss sum's backward pass gives the gradient of ``scale * sum / weight``.

    Of several sums, one whose weight is zero contributes nothing: no sample of the global batch counts for it.
    """
    if isinstance(weight, tuple) and loss_sum.ndim:
        return loss_sum.new_tensor([scale / part if part else 0.0 for part in weight])
    return loss_sum.new_full(loss_sum.shape, scale if isinstance(weight, tuple) else scale / weight)


def describe(value: Any) -> str:
    """Describe tensors by shape and dtype, and texts by the first ones, for messages."""
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {dtype_name(value.dtype)}"
    if isinstance(value, list | tuple):
        if value and all(isinstance(part, str) for part in value):
            return f"{len(value)} texts ({', '.join(map(repr, value[:3]))}{', …' * (len(value) > 3)})"
        return ", ".join(describe(part) for part in value) if value else f"an empty {type(value).__name__}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {describe(part)}" for key, part in value.items())
    return type(value).__name__


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name without the prefix ``torch.``."""
    return str(dtype).removeprefix("torch.")


def full_precision(value: Any) -> Any:
    """Convert half-precision tensors, also those in a plain list, tuple or dict, to float32.

    Sums, exponentials and comparisons in half precision would be rounded to two or three digits, or overflow.
    """
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() and value.dtype.itemsize < 4 else value
    if type(value) is dict:
        return {key: full_precision(part) for key, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(full_precision(part) for part in value)
    return value
