"""Messages about a model's output and a target that a loss cannot compare: what they are, and the key that helps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from runtime.data.fields import Fields
from runtime.errors import ObjectiveError
from runtime.objective import shown

_USUAL_OUTPUTS = ("logits", "output", "outputs", "prediction", "predictions")
_READERS = " (Table does with task: classification, LabelledTexts always)"


def wrong_target(name: str, target: Any, fields: Fields, *, classes: bool, wanted: str = "") -> ObjectiveError:
    """Make an error of a target that is not what a loss compares with.

    Args:
        name: of the loss.
        classes: whether it takes class numbers.
        wanted: what it takes, in more words.
    """
    usual = "class numbers (an integer type, from 0 on)" if classes else "a tensor of numbers"
    cure = (
        f"number the classes where the data is made{_READERS}" if classes else "make it numbers where the data is made"
    )
    return ObjectiveError(
        f"{name} compares the model's output with {wanted or usual}, and the target ({target_name(fields)}) is "
        f"{shown(target)}: {cure}, or let data.fields.target name the part of a batch that is so"
    )


def target_name(fields: Fields) -> str:
    """Return how messages say which part of a batch the target is."""
    said = fields.target
    return (
        f"data.fields.target: {said}" if said is not None else "data.fields.target, by default 'target' or position 1"
    )


def no_tensor(name: str, output: Any) -> ObjectiveError:
    """Make an error of a model that returns several things, of which nothing says which is its output."""
    if isinstance(output, Mapping):
        parts: dict[Any, Any] = dict(output)
    elif isinstance(output, list | tuple):
        parts = dict(enumerate(output))
    else:
        parts = dict(getattr(output, "__dict__", {}))
    tensors = {key: value for key, value in parts.items() if isinstance(value, Tensor)}
    what = f"a {type(output).__name__}{f' of {shown(tensors)}' if tensors else ''}"
    best = next((key for key in _USUAL_OUTPUTS if key in tensors), next(iter(tensors), None))
    cure = f"say which part is its output, such as model.output: {best}" if tensors else "let it return a tensor"
    return ObjectiveError(f"{name} takes a tensor from the model, which returns {what}: {cure}")


def first_line(error: BaseException) -> str:
    """Return what an error says, without what follows its first line."""
    return str(error).strip().split("\n", maxsplit=1)[0]
