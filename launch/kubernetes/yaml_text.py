"""Write data as YAML for review and for ``kubectl``: block style, with comments.

PyYAML's dumper writes no comments, and leaves ``1e-3``, ``y`` and ``0o17`` unquoted. They are strings to PyYAML but numbers or
booleans to the Go parser of Kubernetes, which then refuses them as the value of a variable. Here every string is quoted that
does not look like a word, and every word that some YAML version reads as a constant.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from textwrap import wrap
from typing import Any

import yaml

_PLAIN = re.compile(r"[A-Za-z/][A-Za-z0-9_./-]*")
_CONSTANTS = {"y", "yes", "n", "no", "on", "off", "true", "false", "null"}
_BLOCK = re.compile(r"[\t\n\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]*")
_WIDTH = 110


def manifest_text(documents: Sequence[Mapping[str, Any]]) -> str:
    """Return documents of mappings, lists and scalars as YAML; a key that starts with ``#`` is a comment on the next key."""
    return "".join("---\n" + "".join(f"{line}\n" for line in _lines(document)) for document in documents)


def _lines(value: Any, depth: int = 0) -> Iterator[str]:
    """Yield the lines of a non-empty mapping or list, to be indented by ``depth`` columns (for wrapping comments)."""
    if isinstance(value, list):
        for item in value:
            first, *rest = _lines(item, depth + 2) if _is_nested(item) else _scalar(item).split("\n")
            yield f"- {first}"
            yield from _indented(rest)
        return
    for key, item in value.items():
        if key.startswith("#"):
            yield from (f"# {line}" for line in wrap(item, max(40, _WIDTH - depth)))
        elif _is_nested(item):
            yield f"{_scalar(key)}:"
            yield from _indented(_lines(item, depth + 2))
        else:
            first, *rest = _scalar(item).split("\n")
            yield f"{_scalar(key)}: {first}"
            yield from _indented(rest)


def _indented(lines: Iterable[str]) -> Iterator[str]:
    return (f"  {line}" if line else "" for line in lines)


def _is_nested(value: Any) -> bool:
    return isinstance(value, list | Mapping) and bool(value)


def _scalar(value: Any) -> str:
    if isinstance(value, list | Mapping):
        return "[]" if isinstance(value, list) else "{}"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    assert isinstance(value, str), value
    if _PLAIN.fullmatch(value) and value.lower() not in _CONSTANTS:
        return value
    if "\n" in value and _BLOCK.fullmatch(value):
        return _block(value)
    quoted: str = yaml.safe_dump(value, default_style='"', allow_unicode=True, width=float("inf"))
    return quoted.removesuffix("\n")


def _block(text: str) -> str:
    """Return a multi-line string as a block scalar, with an indentation indicator (it may start with spaces) and chomping."""
    chomping = (
        ""
        if text.endswith("\n") and not text.endswith("\n\n") and text != "\n"
        else "+"
        if text.endswith("\n")
        else "-"
    )
    return f"|2{chomping}\n{text.removesuffix(chr(10))}"
