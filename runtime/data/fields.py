"""Roles of a batch's parts: model inputs, target, weight, id, group; named in the YAML (``data.fields``).

A batch is a mapping, whose parts have keys, or a tuple, whose parts have positions. By default a batch is
``(inputs, target)`` or a mapping with these two keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from runtime.errors import ObjectiveError

Name = str | int
"""The key of a part in a mapping, or its position in a tuple."""


COLUMN = "column:"
"""Prefix in ``prediction.columns`` of a part of the data."""


@dataclass(frozen=True)
class Fields:
    """Reads the parts of a batch.

    Args:
        inputs: one part, passed to the model; several, passed as keyword arguments of these names (as positional ones
            where parts have positions); or a mapping of argument to part. Default: ``inputs``, or position 0.
        target: target of the loss; several parts become a tuple. Default: ``target``, or position 1. If only one of the two
            is given, the other defaults to the key of its name, or to the only position not named otherwise.
        weight: weight of each sample (or of each element of the target).
        id: name of a sample in predictions.
        group: the query or user that a sample belongs to, for ranking metrics.
        output: the part of the model's return value that is its output; a key, an attribute or a position.
    """

    inputs: Name | Sequence[Name] | Mapping[str, Name] | None = None
    target: Name | Sequence[Name] | None = None
    weight: Name | None = None
    id: Name | None = None
    group: Name | None = None
    output: Name | None = None
    _names_nothing: bool = field(init=False, repr=False, compare=False, default=True)

    def __post_init__(self) -> None:
        parts = (self.inputs, self.target, self.weight, self.id, self.group)
        object.__setattr__(self, "_names_nothing", all(part is None for part in parts))

    def arguments(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the positional and the keyword arguments of the model call."""
        names = self.inputs
        if self._names_nothing and type(batch) is tuple and len(batch) == 2 and type(batch[0]) is Tensor:
            return (batch[0],), {}  # the most common batch: the code below takes 2 µs
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
        """Return the target."""
        name = self.target
        if name is None:
            if self._names_nothing and type(batch) is tuple and len(batch) == 2:
                return batch[1]
            return part_of(batch, self._default(batch, "target", 1))
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
        """Return where inputs or target are if the configuration does not name them: not where it names other parts."""
        named = self._named(self.target if key == "inputs" else self.inputs)
        if isinstance(batch, Mapping):
            needed = {key} if named else {"inputs", "target"}
            if needed <= set(batch) and key not in named:
                return key
        elif isinstance(batch, list | tuple):
            others = {name for name in (self.weight, self.id, self.group) if name is not None}
            left = [place for place in range(len(batch)) if place not in named | others]
            if named and len(left) == 1:
                return left[0]
            # Every part that is neither inputs nor target is named.
            if not named and 2 <= len(batch) <= 2 + len(others) and position < len(left):
                return left[position]
        roles = {
            "inputs": "the inputs of the model",
            "target": "the target that its output is compared with",
        }
        raise ObjectiveError(
            f"the batch must be (inputs, target) or have the keys 'inputs' and 'target', not {_shape(batch)}; or name in "
            f"data.fields.{key} the part that is {roles[key]}"
        )

    @staticmethod
    def _named(names: Any) -> set[Name]:
        """Return the parts that one key of the configuration names."""
        if names is None:
            return set()
        if isinstance(names, str | int):
            return {names}
        return set(names.values() if isinstance(names, Mapping) else names)

    def output_of(self, returned: Any) -> Any:
        """Return the output part of the model's return value.

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
                f"model.output: the model's return value has no {self.output!r}: it is {_shape(returned)}"
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
