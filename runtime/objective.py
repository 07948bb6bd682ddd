"""The loss contract: a loss sum and the weight it is divided by, kept apart so that a global batch stays one batch.

An objective returns the *sum* of its losses over a microbatch. The runtime divides by the weight of the whole global
batch, which it knows before the first forward pass. What torch's losses and Lockstep's own count is in the table of
``losses/by_name.py``.

An objective may have several sums, each divided by a weight of its own (:class:`runtime.losses.weighted_sum.WeightedSum`): then
both are one-dimensional, and what is minimised is the sum of the quotients.
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
"""What a loss sum is divided by; one number for each sum where an objective has several."""


class Loss(NamedTuple):
    """What one forward pass returns.

    Attributes:
        sum: sum of the losses over the microbatch, a scalar with a gradient; (weights,) if there are several weights.
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
        reads_sample_weights: ``forward`` and ``weight`` take ``fields.weight_of(batch)`` into account; without it
            ``data.fields.weight`` is refused.
        num_weights: how many sums and weights there are; None: one, a scalar.
        fields: which part of a batch is what; the configuration's ``data.fields``.
    """

    unit = "samples"
    couples_samples = False
    reads_sample_weights = False
    num_weights: int | None = None
    fields = Fields()

    def forward(self, model: nn.Module, batch: Any) -> Loss | Tensor:
        """Return the loss of a microbatch, or its sum alone."""
        raise ObjectiveError(f"{type(self).__name__} has no forward(model, batch)")

    def weight(self, batch: Any) -> float | Tensor:
        """Return the weight of a microbatch, on the CPU and before any forward pass. Default: its samples."""
        raise TypeError("the number of samples is known without asking")

    def checked_weight(self, batch: Any, samples: int) -> Weight:
        """Return the weight of a microbatch of so many samples as a number, or several.

        Raises:
            ObjectiveError: it is negative or not finite, or ``weight`` raised.
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
        """Return the mean loss and its parts from their sums over any set of samples, and that set's weight."""
        assert isinstance(weight, float)
        return {name: total / weight for name, total in sums.items()} if weight > 0 else {}

    def metric_inputs(self, output: Any, batch: Any) -> tuple[Any, ...]:
        """Return the arguments of the metrics' ``update``: predictions and target, masked elements left out."""
        return output, self.fields.target_of(batch)

    def soft_target(self, batch: Any) -> Tensor | None:
        """Return the target that ``metric_inputs`` has made classes of, as it is in the batch; masked elements left out.

        For metrics of values, such as a mean squared error; metrics of classes see the classes. None: they are the same.
        """
        return None

    def predicted(self, output: Any) -> Mapping[str, Tensor]:
        """Return what can be written of the model's output, by name; one row a sample.

        Without a target, so that data of which nothing is known can be predicted. ``probabilities``: (batch, classes), one
        class is right; ``probability``: (batch,) or (batch, labels), of a yes; from these ``class`` and the best classes
        follow. Any other name can be written too.
        """
        return {"output": output}

    def metric_mask(self, batch: Any) -> Tensor | None:
        """Return which elements of the target ``metric_inputs`` keeps, in the target's shape; None if it keeps them all."""
        return None

    @property
    def counts_samples(self) -> bool:
        """Tell whether the weight is the number of samples, which the order tells without reading data."""
        return type(self).weight is Objective.weight


class ModelCall(NamedTuple):
    """In the place of a batch: a call of the model alone.

    For strategies that must be told of each call at the root of what they wrap.
    """

    positional: tuple[Any, ...]
    named: dict[str, Any]


class TrainingModule(nn.Module):
    """Model and objective as the one module that a strategy prepares.

    Attributes:
        frozen: parts of it that stay in evaluation mode.
        silent_fillers: whether fillers give parameters no gradient, rather than one of zeros. No gradient leaves a parameter
            as it is; of zeros, an optimizer makes an update (weight decay, momentum).
    """

    frozen: Sequence[nn.Module] = ()
    silent_fillers = False

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self.objective = objective

    def train(self, mode: bool = True) -> Self:
        """Set training or evaluation mode, frozen parts excepted."""
        super().train(mode)
        for part in self.frozen:
            part.eval()
        return self

    def forward(self, batch: Any, filler: bool = False) -> Loss:
        """Return the loss of a microbatch; for a filler a zero that reaches every trainable parameter.

        Raises:
            ObjectiveError: the objective returned something else than a scalar sum.
            ForwardError: model or objective raised.
        """
        if isinstance(batch, ModelCall):
            return self.model(*batch.positional, **batch.named)  # type: ignore[no-any-return]
        try:
            loss = self.objective.forward(self.model, batch)
        except Exception as error:
            told = explained(error, self, shown(batch))
            if told is None:
                raise
            raise told from error
        if filler:
            trainable = [p for p in self.parameters() if p.requires_grad]
            return Loss(_Zero.apply(self.silent_fillers, *trainable))  # type: ignore[no-untyped-call]
        if isinstance(loss, Tensor):
            loss = Loss(loss)
        found = loss.sum if isinstance(loss, Loss) else loss
        dimensions = 0 if self.objective.num_weights is None else 1
        if not isinstance(loss, Loss) or not isinstance(found, Tensor) or found.ndim != dimensions:
            got = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise ObjectiveError(
                f"{type(self.objective).__name__} must return the sum of its losses, a scalar or runtime.objective.Loss, "
                f"not {got}; with torch's losses use reduction='sum'"
            )
        if not found.is_floating_point():
            raise ObjectiveError(
                f"{type(self.objective).__name__} returned a sum in {plain(found.dtype)}; a loss is a real number: of complex "
                "outputs take .abs() or .real in it, and count in floating point"
            )
        if loss.parts:
            self._check_parts(loss.parts)
        if not found.requires_grad and torch.is_grad_enabled():
            raise ObjectiveError(
                f"{type(self.objective).__name__} returned a sum without a gradient: no trainable parameter leads to it"
            )
        return loss

    def _check_parts(self, parts: Mapping[str, Tensor]) -> None:
        for name, part in parts.items():
            if name in _RESERVED:
                raise ObjectiveError(
                    f"{type(self.objective).__name__}: a part cannot be called {name!r}, which reports have a figure of already"
                )
            if not isinstance(part, Tensor) or part.ndim != 0:
                raise ObjectiveError(
                    f"{type(self.objective).__name__}: part {name!r} must be a scalar tensor, a sum like the loss"
                )


class _Zero(torch.autograd.Function):
    """A zero that reaches every parameter, whatever the parameters or a loss hold: 0 * inf would be NaN.

    Args:
        silent: give the parameters no gradient at all, rather than one of zeros.
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
    """Return the weight of two sets of samples together; ``first`` may be 0.0, that of nothing."""
    if isinstance(second, tuple):
        return tuple(a + b for a, b in zip(first, second, strict=True)) if isinstance(first, tuple) else second
    assert isinstance(first, float)
    return first + second


def starting_gradient(loss_sum: Tensor, weight: Weight, *, scale: float = 1.0) -> Tensor:
    """Return what a backward pass from a loss sum starts with to give the gradient of ``scale * sum / weight``.

    Of several sums, one whose weight is zero has nothing to say: it counts no sample of the global batch.
    """
    if isinstance(weight, tuple) and loss_sum.ndim:
        return loss_sum.new_tensor([scale / part if part else 0.0 for part in weight])
    return loss_sum.new_full(loss_sum.shape, scale if isinstance(weight, tuple) else scale / weight)


def shown(value: Any) -> str:
    """Describe a tensor, or several, by shape and type, for messages; of texts the first ones."""
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {plain(value.dtype)}"
    if isinstance(value, list | tuple):
        if value and all(isinstance(part, str) for part in value):
            return f"{len(value)} texts ({', '.join(map(repr, value[:3]))}{', …' * (len(value) > 3)})"
        return ", ".join(shown(part) for part in value) if value else f"an empty {type(value).__name__}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {shown(part)}" for key, part in value.items())
    return type(value).__name__


def plain(dtype: torch.dtype) -> str:
    """Return a type's name without torch's own."""
    return str(dtype).removeprefix("torch.")


def full_precision(value: Any) -> Any:
    """Return a tensor, or those in a plain list, tuple or dict, in float32 where its floating point is shorter than that.

    Sums, exponentials and comparisons in half precision would be rounded to two or three digits, or overflow.
    """
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() and value.dtype.itemsize < 4 else value
    if type(value) is dict:
        return {key: full_precision(part) for key, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(full_precision(part) for part in value)
    return value
