"""JSON that somebody else may have written: what is no JSON of ours is a ValueError, whatever is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_DEEPEST = 100  # levels; what we write has some twenty


def read(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON, is nested deeper than anything that we write, or has a key twice.
    """
    return parse(path.read_text(encoding="utf-8"))


def parse(text: str | bytes) -> Any:
    """Return what JSON says.

    Raises:
        ValueError: as :func:`read`.
    """
    try:
        found = json.loads(text, object_pairs_hook=_mapping)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    _refuse_depth(found)
    return found


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice[:60]!r} is there twice")
    return found


def _refuse_depth(found: Any) -> None:
    """Without recursion: later readers recurse, and Python's own parser reads deeper than they can go."""
    level, depth = [found], 0
    while level:
        depth += 1
        if depth > _DEEPEST:
            raise ValueError(f"it is nested deeper than {_DEEPEST} levels")
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                inner += [each for each in value.values() if isinstance(each, dict | list)]
            elif isinstance(value, list):
                inner += [each for each in value if isinstance(each, dict | list)]
        level = inner
