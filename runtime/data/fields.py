"""Which part of a batch is what: model inputs, target, weight, id, group; said by name in the YAML (``data.fields``).

A batch is a mapping, whose parts have keys, or a tuple, whose parts have positions. Without names a batch is
``(inputs, target)`` or a mapping with these two keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from runtime.errors import ObjectiveError

Name = str | int
"""The key of a part in a mapping, or its position in a tuple."""


@dataclass(frozen=True)
class Fields:
    """Reads the parts of a batch.

    Args:
        inputs: one part, whose value is what the model is called with; several, which become keyword arguments of these
            names (positional ones where parts have positions); or argument to part. Default: ``inputs``, or position 0.
        target: what the output is compared with; several parts become a tuple. Default: ``target``, or position 1.
        weight: weight of each sample (or of each element of the target).
        id: what a sample is called in predictions.
        group: the query or user that a sample belongs to, for ranking metrics.
        output: which part of what the model returns is its output; a key, an attribute or a position.
    """

    inputs: Name | Sequence[Name] | Mapping[str, Name] | None = None
    target: Name | Sequence[Name] | None = None
    weight: Name | None = None
    id: Name | None = None
    group: Name | None = None
    output: Name | None = None

    def arguments(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the positional and the keyword arguments that the model is called with."""
        names = self.inputs
        if names is None and type(batch) is tuple and len(batch) == 2 and type(batch[0]) is Tensor:
            return (batch[0],), {}  # the commonest batch: what follows takes 2 µs
        if isinstance(names, Mapping):
            return (), {argument: part_of(batch, name) for argument, name in names.items()}
        if isinstance(names, Sequence) and not isinstance(names, str):
            parts = [(name, part_of(batch, name)) for name in names]
            by_position = tuple(part for name, part in parts if isinstance(name, int))
            return by_position, {name: part for name, part in parts if isinstance(name, str)}
        inputs = part_of(batch, self._default(batch, "inputs", 0) if names is None else names)
        if isinstance(inputs, Mapping):
            return (), dict(inputs)
        if isinstance(inputs, list | tuple):
            return tuple(inputs), {}
        return (inputs,), {}

    def target_of(self, batch: Any) -> Any:
        """Return what the output is compared with."""
        name = self.target
        if name is None:
            return (
                batch[1]
                if type(batch) is tuple and len(batch) == 2
                else part_of(batch, self._default(batch, "target", 1))
            )
        return part_of(batch, name) if isinstance(name, str | int) else tuple(part_of(batch, part) for part in name)

    def weight_of(self, batch: Any) -> Any:
        """Return the samples' weights, or None if there are none."""
        return None if self.weight is None else part_of(batch, self.weight)

    def id_of(self, batch: Any) -> Any:
        """Return the samples' names, or None if they have none."""
        return None if self.id is None else part_of(batch, self.id)

    def group_of(self, batch: Any) -> Any:
        """Return the samples' groups, or None if there are none."""
        return None if self.group is None else part_of(batch, self.group)

    def _default(self, batch: Any, key: str, position: int) -> Name:
        if isinstance(batch, Mapping):
            if {"inputs", "target"} <= set(batch):
                return key
        elif isinstance(batch, list | tuple):
            others = sum(name is not None for name in (self.weight, self.id, self.group))
            if 2 <= len(batch) <= 2 + others:  # what is behind the target has been named
                return position
        raise ObjectiveError(
            f"the batch must be (inputs, target) or have the keys 'inputs' and 'target', not {_shape(batch)}; or say in "
            "data.fields which part is what"
        )

    def output_of(self, returned: Any) -> Any:
        """Return the part of what the model returned that is its output.

        Raises:
            ObjectiveError: there is no such part.
        """
        if self.output is None:
            return returned
        if isinstance(self.output, str) and not isinstance(returned, Mapping) and hasattr(returned, self.output):
            return getattr(returned, self.output)
        try:
            return returned[self.output]
        except (KeyError, IndexError, TypeError) as error:
            raise ObjectiveError(
                f"model.output: what the model returns has no {self.output!r}: it is {_shape(returned)}"
            ) from error


def part_of(batch: Any, name: Name) -> Any:
    """Return a part of a batch by name.

    Raises:
        ObjectiveError: there is no such part.
    """
    try:
        return batch[name]
    except (KeyError, IndexError, TypeError) as error:
        raise ObjectiveError(f"data.fields: the batch has no {name!r}: it is {_shape(batch)}") from error


def _shape(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a mapping with the keys {', '.join(repr(key) for key in value)}"
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    size = f" of {len(value)}" if hasattr(value, "__len__") else ""
    return f"a {type(value).__name__}{size}"
