"""Generates ``docs/reference/configuration.md``, every key of the YAML, from the JSON Schema. Imports no torch.

It is here rather than in ``docs/`` so that ``lockstep schema --markdown`` prints the reference of the installed version.
``tests/test_reference.py`` compares the committed page with it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

Schema = Mapping[str, Any]

_INTRODUCTION = """\
# Every key of the YAML

<!-- Generated: lockstep schema --markdown > docs/reference/configuration.md -->

The sections of a run's YAML, in order. `lockstep schema --markdown` prints this page for the installed version, and
`lockstep schema` the JSON Schema behind it.

Each key is followed by its type, its default, and whether it may change when an interrupted run is resumed:

- *required*: the key must be given. A key without a default is not set unless given; its description states the effect.
- *exact*: a change would change the result of the run, so resuming refuses it, with the old and the new value, unless
  `resume.allow_changes` names the key. *free*: it may change. For a section, see its keys.
- Two cases depend on other keys: with `ReduceLROnPlateau`, which counts evaluations, `evaluation.every` may not change; if the
  length of the schedule is derived from `limit.epochs` or `limit.steps`, these may not.
- `NAME` in a heading stands for a name of your choice, `[]` for each element of a list.
- Keys that end in `_seconds` are in seconds, `_bytes` in bytes, `_mb` in MiB; ratios lie between 0 and 1.
- Every key can also be given on the command line: `optimizer.args.lr=1e-3`. Scalars are those of YAML 1.2.
"""
_COMPONENT = "ComponentSection"
_COMPONENTS = "Components"


@dataclass
class _Section:
    """One section: its paths in the YAML, and its keys.

    Args:
        schema: of the section.
        paths: where it may occur; its keys are listed at the first.
        free: those of its paths that are below a free key.
    """

    schema: Schema
    paths: list[str] = field(default_factory=list)
    free: list[str] = field(default_factory=list)


def markdown() -> str:
    """Return the page."""
    from runtime.config.file import json_schema

    schema = json_schema()
    sections = _sections(schema)
    anchors = {name: anchor(section.paths[0]) for name, section in sections.items()}
    keys = _Keys(anchors, schema["$defs"])
    parts = [_INTRODUCTION, f"## Top level\n\n{keys.listed(_Section(schema, ['Top level']))}"]
    parts += [f"## {_heading(section)}\n\n{_text(section)}\n\n{keys.listed(section)}" for section in sections.values()]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def anchor(heading: str) -> str:
    """Return the anchor that Markdown gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-")


def _sections(schema: Schema) -> dict[str, _Section]:
    """Return the sections by their name in the schema, in the order of the YAML."""
    sections: dict[str, _Section] = {}

    def visit(of: Schema, path: str, free: bool) -> None:
        for key, value in of["properties"].items():
            freed = free or value.get("resume") == "free"
            for name, suffix in _references(value):
                inner = f"{path}{key}{suffix}"
                section = sections.setdefault(name, _Section(schema["$defs"][name]))
                section.paths.append(inner)
                section.free += [inner] * freed
                if len(section.paths) == 1:
                    visit(section.schema, f"{inner}.", freed)

    visit(schema, "", False)
    if _COMPONENT in sections:
        sections[_COMPONENT] = sections.pop(_COMPONENT)  # it occurs everywhere, so it comes last
        sections[_COMPONENT].paths = [_COMPONENTS]
    return sections


def _references(schema: Any, suffix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the sections that a key may hold, and the suffix of the key in their path."""
    if isinstance(schema, Mapping):
        if "$ref" in schema:
            yield schema["$ref"].rpartition("/")[2], suffix
        for part in schema.get("anyOf", []):
            yield from _references(part, suffix)
        yield from _references(schema.get("items"), suffix + "[]")
        yield from _references(schema.get("additionalProperties"), suffix + ".NAME")


def _heading(section: _Section) -> str:
    return _COMPONENTS if section.paths[0] == _COMPONENTS else f"`{section.paths[0]}`"


def _text(section: _Section) -> str:
    """Return the text between a section's heading and its keys."""
    first, *others = section.paths
    if first == _COMPONENTS:
        return (
            "The type *component*: a class or function of torch, torchmetrics, Lockstep or your own, and the arguments it is "
            "called with. The target may be written alone: `collate: Padded`."
        )
    text = _plain(section.schema.get("description", ""), joined=False)
    if others:
        text += f"\n\nThe same keys: {', '.join(f'`{path}`' for path in others)}."
    free = [path for path in others if path in section.free]
    if free and first not in section.free:
        text += f" All keys of {', '.join(f'`{path}`' for path in free)} are free."
    return text


@dataclass
class _Keys:
    """Formats lists of keys.

    Args:
        anchors: of the sections, by their name in the schema.
        definitions: schemas of the sections, by name.
    """

    anchors: Mapping[str, str]
    definitions: Mapping[str, Schema]

    def listed(self, section: _Section) -> str:
        """Return the list of a section's keys."""
        required = section.schema.get("required", [])
        properties = section.schema["properties"]
        return "\n".join(self._entry(section, key, value, key in required) for key, value in properties.items())

    def _entry(self, section: _Section, key: str, value: Schema, required: bool) -> str:
        sections = [name for name, _ in _references(value) if name != _COMPONENT]
        described = value.get("description") or (self.definitions[sections[0]]["description"] if sections else "")
        facts = [_type(value, self.anchors)]
        if required:
            facts.append("*required*")
        elif (default := value.get("default")) is not None and not (sections and default):
            facts.append(f"default {_shown(default)}")
        if section.paths[0] in section.free or value.get("resume") == "free":
            facts.append("*free*")
        elif not sections and section.paths[0] != _COMPONENTS:
            facts.append("*exact*")
        return f"- **`{key}`** · {' · '.join(facts)}<br>\n  {_plain(described)}"


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def _type(schema: Schema, anchors: Mapping[str, str]) -> str:
    """Return a type in words, sections and components as links."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{'component' if name == _COMPONENT else 'section'}](#{anchors[name]})"
    if "anyOf" in schema:
        kinds = [_type(part, anchors) for part in schema["anyOf"] if part.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    kind = schema.get("type", "mapping")
    if isinstance(kind, list):
        return " or ".join(_type({"type": one}, anchors) for one in kind)
    if kind == "array":
        return f"list of {_type(schema['items'], anchors)}" if schema.get("items") else "list"
    if kind == "object":
        inner = schema.get("additionalProperties")
        return f"mapping of names to {_type(inner, anchors)}" if isinstance(inner, Mapping) else "mapping"
    if kind == "string":
        examples = schema.get("examples")
        return f"text such as {', '.join(f'`{example}`' for example in examples)}" if examples else "text"
    return {"integer": "whole number", "boolean": "true or false"}.get(kind, str(kind)) + _bounds(schema)


def _bounds(schema: Schema) -> str:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {schema[key]:g}" for key, sign in signs.items() if key in schema and abs(schema[key]) < 2**53]
    return f" {', '.join(bounds)}" if bounds else ""


def _plain(text: str, *, joined: bool = True) -> str:
    """Return a docstring as Markdown, on one line if ``joined``."""
    text = text.replace("``", "`")
    if joined:
        return " ".join(text.split())
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
