"""Collate samples that vary in length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import default_collate

from runtime.errors import DataError
from runtime.wording import did_you_mean

Name = str | int


class Padded:
    """Collate samples, padding parts that vary along their first axis to the longest in the microbatch.

    Samples are tensors, arrays, numbers or lists of numbers, in arbitrarily nested mappings and tuples; parts that do not
    vary are stacked as by torch's ``default_collate``. A part is named by its key, or its position in a tuple; a nested one
    by its path, such as ``inputs.tokens``.

    Args:
        value: padding value.
        parts: parts to pad (the others must agree in shape), or a mapping of part to padding value: ``{input_ids: 0,
            target: -100}``. Default: all whose lengths differ in the microbatch.
        multiple_of: pad to the next multiple of this length; needs ``parts``.
        mask: name of an added part: (samples, length) bool, True where the first of ``parts`` has values.
        lengths: name of an added part: (samples,) int64, the lengths of the first of ``parts`` before padding.

    A batch of tuples has the added parts at its end, the mask first.

    Raises:
        DataError: samples differ in their parts, or in the shape of a part that is not padded.
    """

    def __init__(
        self,
        value: float = 0,
        *,
        parts: Sequence[Name] | Mapping[Name, float] | None = None,
        multiple_of: int = 1,
        mask: str | None = None,
        lengths: str | None = None,
    ) -> None:
        if multiple_of < 1:
            raise DataError(f"Padded: multiple_of={multiple_of} must be at least 1")
        if not parts and (multiple_of > 1 or mask or lengths):
            raise DataError("Padded: 'multiple_of', 'mask' and 'lengths' need 'parts', the parts that are sequences")
        self._value = value
        values = parts if isinstance(parts, Mapping) else dict.fromkeys(parts or (), value)
        self._values = {str(name): padding for name, padding in values.items()}
        self._multiple_of = multiple_of
        self._mask, self._lengths = mask, lengths

    def __call__(self, samples: list[Any]) -> Any:
        """Return one batch."""
        lengths: dict[str, list[int]] = {}  # by part, filled while collating
        batch = self._collated(samples, "", lengths)
        unknown = [name for name in self._values if name not in lengths]
        if unknown:
            raise DataError(f"Padded: samples have no part {unknown[0]!r} to pad{did_you_mean(unknown[0], lengths)}")
        return self._with_lengths(batch, lengths) if self._mask or self._lengths else batch

    def _collated(self, samples: list[Any], path: str, lengths: dict[str, list[int]]) -> Any:
        first = samples[0]
        if isinstance(first, Mapping):
            if any(sample.keys() != first.keys() for sample in samples):
                raise DataError(f"Padded: samples differ in their keys{f' at {path}' * bool(path)}")
            return {key: self._collated([s[key] for s in samples], _joined(path, key), lengths) for key in first}
        if isinstance(first, tuple) or (isinstance(first, list) and not _all_numbers(first)):
            if any(len(sample) != len(first) for sample in samples):
                raise DataError(f"Padded: samples differ in their number of parts{f' at {path}' * bool(path)}")
            parts = [
                self._collated(list(s), _joined(path, n), lengths) for n, s in enumerate(zip(*samples, strict=True))
            ]
            return type(first)(*parts) if hasattr(first, "_fields") else tuple(parts)
        if isinstance(first, Tensor | np.ndarray | list):
            return self._stacked([torch.as_tensor(sample) for sample in samples], path, lengths)
        return default_collate(samples)

    def _stacked(self, tensors: list[Tensor], path: str, lengths: dict[str, list[int]]) -> Tensor:
        name = path or "0"  # a sample that is a single tensor
        sizes = [len(tensor) if tensor.ndim else 0 for tensor in tensors]
        lengths[name] = sizes
        listed = name in self._values
        if not listed and (self._values or len(set(sizes)) == 1):
            if any(tensor.shape != tensors[0].shape for tensor in tensors):
                raise DataError(f"Padded: part {name!r} differs in shape ({_shapes(tensors)}) and is not among 'parts'")
            return torch.stack(tensors)
        if any(tensor.ndim == 0 or tensor.shape[1:] != tensors[0].shape[1:] for tensor in tensors):
            raise DataError(f"Padded: part {name!r} must agree in all but its first axis, not {_shapes(tensors)}")
        longest = -(-max(sizes) // self._multiple_of) * self._multiple_of
        value = self._values.get(name, self._value)
        other_axes = [0, 0] * (tensors[0].ndim - 1)
        return torch.stack(
            [F.pad(t, [*other_axes, 0, longest - size], value=value) for t, size in zip(tensors, sizes, strict=True)]
        )

    def _with_lengths(self, batch: Any, lengths: dict[str, list[int]]) -> Any:
        sizes = torch.tensor(lengths[next(iter(self._values))])
        longest = -(-int(sizes.max()) // self._multiple_of) * self._multiple_of
        added: dict[str, Tensor] = {}
        if self._mask:
            added[self._mask] = torch.arange(longest) < sizes[:, None]
        if self._lengths:
            added[self._lengths] = sizes
        if not isinstance(batch, Mapping):
            return (*(batch if isinstance(batch, tuple) else (batch,)), *added.values())
        taken = [name for name in added if name in batch]
        if taken:
            raise DataError(f"Padded: samples already have a part {taken[0]!r}; choose another name")
        return {**batch, **added}


def _joined(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def _all_numbers(values: list[Any]) -> bool:
    return all(isinstance(value, int | float) for value in values)


def _shapes(tensors: list[Tensor]) -> str:
    distinct = list(dict.fromkeys(str(tuple(tensor.shape)) for tensor in tensors))
    return ", ".join(distinct[:4]) + ", …" * (len(distinct) > 4)
