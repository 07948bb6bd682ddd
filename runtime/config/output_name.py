"""Fills in the run folder's name: ``{key}`` stands for the value of a key of the configuration. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from runtime.wording import did_you_mean

_FIELD = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_UNSAFE = re.compile(r"[^\w.+=,@%-]+")
_LONGEST = 80
_SECRETS = ("KEY", "TOKEN", "SECRET", "PASSWORD")


class TemplateError(Exception):
    """A name cannot be filled in; the message is the reason."""


def filled(template: str, values: Mapping[str, Any]) -> str:
    """Fill in ``{key.path}``; ``{{`` and ``}}`` stand for braces.

    Args:
        values: the whole configuration, nested. ``name`` is inserted as it is; other values are made safe for a path.

    Raises:
        TemplateError: there is no such key, or its value cannot be part of a name.
    """

    def replacement(match: re.Match[str]) -> str:
        if match[0] in ("{{", "}}"):
            return match[0][0]
        if match[1] is None:
            raise TemplateError(f"has a single {match[0]!r}; write {match[0] * 2!r} for the character itself")
        return str(values["name"]) if match[1] == "name" else _safe(match[1], _value(match[1], values))

    return _FIELD.sub(replacement, template)


def escaped(path: str) -> str:
    """Return the template that yields a given path."""
    return path.replace("{", "{{").replace("}", "}}")


def _value(key: str, values: Mapping[str, Any]) -> Any:
    value: Any = values
    for depth, part in enumerate(key.split(".")):
        if isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        elif isinstance(value, Mapping) and part in value:
            value = value[part]
        else:
            known = [str(name) for name in value] if isinstance(value, Mapping) else []
            above = ".".join(key.split(".")[:depth])
            choices = f"; known in {above or 'the configuration'}: {', '.join(known)}" if known else ""
            raise TemplateError(f"has {{{key}}}, but there is no such key{did_you_mean(part, known) or choices}")
    if key == "output":
        raise TemplateError("has {output}, which is this key itself")
    if isinstance(value, Mapping) or (isinstance(value, list) and any(isinstance(v, list | Mapping) for v in value)):
        raise TemplateError(f"has {{{key}}}, which is a section; name one of its keys")
    if key.rpartition(".")[2].upper().endswith(_SECRETS):
        raise TemplateError(f"has {{{key}}}, which is a secret")
    return value


def _safe(key: str, value: Any) -> str:
    text = "-".join(map(_text, value)) if isinstance(value, list) else _text(value)
    safe = _UNSAFE.sub("-", text).strip("-.")[:_LONGEST]
    if not safe:
        raise TemplateError(f"has {{{key}}}, whose value {value!r} has no characters that are allowed in a folder name")
    return safe if not text.startswith("-") or not isinstance(value, int | float) else f"-{safe}"


def _text(value: Any) -> str:
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)
