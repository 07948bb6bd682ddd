"""Errors for a model output or a target that a loss cannot use, with the configuration key that fixes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from runtime.data.fields import Fields
from runtime.errors import ObjectiveError
from runtime.objective import describe

_USUAL_OUTPUTS = ("logits", "output", "outputs", "prediction", "predictions")
_READERS = " (Table does with task: classification, LabelledTexts always)"


def wrong_target(name: str, target: Any, fields: Fields, *, classes: bool, wanted: str = "") -> ObjectiveError:
    """Return an error for a target of the wrong type.

    Args:
        name: of the loss.
        classes: whether it takes class numbers.
        wanted: description of what it takes; default: by ``classes``.
    """
    usual = "class numbers (an integer type, from 0 on)" if classes else "a tensor of numbers"
    hint = f"number the classes in the data set{_READERS}" if classes else "convert it to numbers in the data set"
    return ObjectiveError(
        f"{name} compares the model's output with {wanted or usual}, but the target ({target_name(fields)}) is "
        f"{describe(target)}: {hint}, or set data.fields.target to another part of the batch"
    )


def target_name(fields: Fields) -> str:
    """Return, for messages, which part of a batch the target is."""
    name = fields.target
    return (
        f"data.fields.target: {name}" if name is not None else "data.fields.target, by default 'target' or position 1"
    )


def no_tensor(name: str, output: Any) -> ObjectiveError:
    """Return an error for a model that does not return a tensor, where ``model.output`` is not set."""
    if isinstance(output, Mapping):
        parts: dict[Any, Any] = dict(output)
    elif isinstance(output, list | tuple):
        parts = dict(enumerate(output))
    else:
        parts = dict(getattr(output, "__dict__", {}))
    tensors = {key: value for key, value in parts.items() if isinstance(value, Tensor)}
    returned = f"a {type(output).__name__}{f' of {describe(tensors)}' if tensors else ''}"
    best = next((key for key in _USUAL_OUTPUTS if key in tensors), next(iter(tensors), None))
    hint = f"name the part to use, such as model.output: {best}" if tensors else "let it return a tensor"
    return ObjectiveError(f"{name} takes a tensor from the model, which returns {returned}: {hint}")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message."""
    return str(error).strip().split("\n", maxsplit=1)[0]
