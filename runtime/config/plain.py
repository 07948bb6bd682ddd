"""Converts a mapping from Python to the plain values of a YAML file, so that both are read the same way. Imports no torch.

``yaml.safe_load`` follows YAML 1.1, where ``3e-4`` is text and ``2026-01-31`` a date; programs pass NumPy numbers, paths,
tuples and enums. Values that YAML cannot represent are left unchanged, for the loader to refuse.
"""

from __future__ import annotations

import datetime
import re
import sys
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import PurePath
from typing import Any

_ONLY_IN_1_2 = re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)[eE][-+]?\d+|0o[0-7]+")
"""Numbers that PyYAML leaves as text: exponents without a dot or a sign, and octal numbers of YAML 1.2."""
_OF_1_1 = re.compile(r"[-+]?(\d+\.\d*|\.\d+)[eE][-+]\d+")

Path = tuple[str, ...]


class ContainsItselfError(Exception):
    """A mapping or list contains itself, at ``path``."""

    def __init__(self, path: Path) -> None:
        super().__init__(".".join(path))
        self.path = path


def plain(value: Any, texts: dict[Path, str], path: Path = (), above: tuple[int, ...] = ()) -> Any:
    """Copy nested values as plain ones.

    Args:
        texts: filled with text that was read as a number, by path; it is restored for keys that take only text.

    Raises:
        ContainsItselfError: a mapping or list contains itself.
    """
    if id(value) in above:
        raise ContainsItselfError(path)
    if isinstance(value, Mapping):
        inner = (*above, id(value))
        return {key: plain(part, texts, (*path, str(key)), inner) for key, part in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray | memoryview):
        inner = (*above, id(value))
        return [plain(part, texts, (*path, str(number)), inner) for number, part in enumerate(value)]
    value = _scalar(value)
    if isinstance(value, str) and _ONLY_IN_1_2.fullmatch(value) and not _OF_1_1.fullmatch(value):
        texts[path] = value
        return int(value, 8) if value.startswith("0o") else float(value)
    return value


def put(values: Any, path: Path, value: Any) -> None:
    """Replace the value at a path."""
    for key in path[:-1]:
        values = values[int(key)] if isinstance(values, list) else values[key]
    values[int(path[-1]) if isinstance(values, list) else path[-1]] = value


def _scalar(value: Any) -> Any:
    """Convert a scalar to its plain type; subclasses of numbers and text cannot be written to a YAML file."""
    numpy = sys.modules.get("numpy")  # imported if the value is one of its numbers
    if isinstance(value, Enum):
        return _scalar(value.value)
    if numpy is not None and isinstance(value, numpy.generic):
        return _scalar(value.item()) if type(value.item()) is not type(value) else value
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, datetime.date):
        return value.isoformat()
    for kind in (int, float, str):
        if isinstance(value, kind) and not isinstance(value, bool) and type(value) is not kind:
            return kind(value)
    return value
