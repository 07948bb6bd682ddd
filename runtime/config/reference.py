"""Every key of the YAML as one Markdown page, made from the JSON Schema: ``docs/reference/configuration.md``. No torch.

It lives beside the sections rather than in ``docs/`` so that ``lockstep schema --markdown`` prints the reference of the version
that is installed. ``tests/test_reference.py`` compares the committed page with it.
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

One table for each section, in the order of the YAML. `lockstep schema --markdown` prints this page, and `lockstep schema` the
JSON Schema behind it, for the version that is installed.

- **Default**: *required* means that the key must be given. A dash means that the key is not set; the description says what
  happens then. *Its own* stands for a section all of whose keys have defaults.
- **Resume**: whether the key may differ when an interrupted run is resumed. A *no* is refused with the old and the new value,
  unless `resume.allow_changes` names the key; *section* means that the keys of the section answer for themselves.
  Two answers depend on other keys: with `ReduceLROnPlateau`, which counts evaluations, `evaluation.every` may not change; where
  the length of the schedule follows from `limit.epochs` or `limit.steps`, these may not.
- `NAME` in a heading stands for a name of your choice, `[]` for each element of a list.
- Keys that end in `_seconds` are in seconds, `_bytes` in bytes, `_mb` in MiB; ratios lie between 0 and 1.
- Every key can also be given on the command line: `optimizer.args.lr=1e-3`. Scalars are those of YAML 1.2.
"""
_HEADER = "| key | type | default | resume | description |\n|---|---|---|---|---|"
_COMPONENT = "ComponentSection"
_COMPONENTS = "Components"


@dataclass
class _Table:
    """One section: where it occurs in the YAML, and its keys.

    Args:
        schema: of the section.
        paths: where it may stand, the first with its table.
        free: those of its paths that are below a key that may change as a whole.
    """

    schema: Schema
    paths: list[str] = field(default_factory=list)
    free: list[str] = field(default_factory=list)


def markdown() -> str:
    """Return the page."""
    from runtime.config.file import json_schema

    schema = json_schema()
    tables = _tables(schema)
    anchors = {name: anchor(table.paths[0]) for name, table in tables.items()}
    rows = _Rows(anchors, schema["$defs"])
    parts = [_INTRODUCTION, f"## Top level\n\n{rows.table(_Table(schema, ['Top level']))}"]
    parts += [f"## {_heading(table)}\n\n{_text(table)}\n\n{rows.table(table)}" for table in tables.values()]
    return "\n\n".join(parts) + "\n"


def anchor(heading: str) -> str:
    """Return the anchor that Markdown gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-")


def _tables(schema: Schema) -> dict[str, _Table]:
    """Return the sections by their name in the schema, in the order in which the YAML comes to them."""
    found: dict[str, _Table] = {}

    def visit(of: Schema, path: str, free: bool) -> None:
        for key, value in of["properties"].items():
            freed = free or value.get("resume") == "free"
            for name, suffix in _references(value):
                inner = f"{path}{key}{suffix}"
                table = found.setdefault(name, _Table(schema["$defs"][name]))
                table.paths.append(inner)
                table.free += [inner] * freed
                if len(table.paths) == 1:
                    visit(table.schema, f"{inner}.", freed)

    visit(schema, "", False)
    if _COMPONENT in found:
        found[_COMPONENT] = found.pop(_COMPONENT)  # it occurs everywhere, so it comes last
        found[_COMPONENT].paths = [_COMPONENTS]
    return found


def _references(schema: Any, suffix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the sections that a key may hold, and what follows the key in their path."""
    if isinstance(schema, Mapping):
        if "$ref" in schema:
            yield schema["$ref"].rpartition("/")[2], suffix
        for part in schema.get("anyOf", []):
            yield from _references(part, suffix)
        yield from _references(schema.get("items"), suffix + "[]")
        yield from _references(schema.get("additionalProperties"), suffix + ".NAME")


def _heading(table: _Table) -> str:
    return _COMPONENTS if table.paths[0] == _COMPONENTS else f"`{table.paths[0]}`"


def _text(table: _Table) -> str:
    """Return what stands between a section's heading and its table."""
    first, *others = table.paths
    if first == _COMPONENTS:
        return (
            "Wherever a type says *component*: a class or function of torch, torchmetrics, Lockstep or your own, and the "
            "arguments it is called with. The target alone may stand for it: `collate: Padded`."
        )
    text = _plain(table.schema.get("description", ""), joined=False)
    if others:
        text += f"\n\nThe same keys: {', '.join(f'`{path}`' for path in others)}."
    free = [path for path in others if path in table.free]
    if free and first not in table.free:
        text += f" All keys of {', '.join(f'`{path}`' for path in free)} may change on resumption."
    return text


@dataclass
class _Rows:
    """Tables of keys.

    Args:
        anchors: of the sections, by their name in the schema.
        definitions: the sections by name.
    """

    anchors: Mapping[str, str]
    definitions: Mapping[str, Schema]

    def table(self, table: _Table) -> str:
        """Return one section's table."""
        required = table.schema.get("required", [])
        rows = [self._row(table, key, value, key in required) for key, value in table.schema["properties"].items()]
        return "\n".join([_HEADER, *rows])

    def _row(self, table: _Table, key: str, value: Schema, required: bool) -> str:
        sections = [name for name, _ in _references(value) if name != _COMPONENT]
        described = value.get("description") or (self.definitions[sections[0]]["description"] if sections else "")
        if table.paths[0] == _COMPONENTS:
            may_change = "as its key"
        elif table.paths[0] in table.free or value.get("resume") == "free":
            may_change = "yes"
        else:
            may_change = "section" if sections else "no"
        default = "*required*" if required else _default(value.get("default"), is_section=bool(sections))
        cells = (f"`{key}`", _type(value, self.anchors), default, may_change, _plain(described))
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _default(value: Any, *, is_section: bool) -> str:
    if value is None:
        return "–"
    if isinstance(value, dict) and value and is_section:
        return "*its own*"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def _type(schema: Schema, anchors: Mapping[str, str]) -> str:
    """Return a type in words, sections and components as links to their tables."""
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
    """Return a docstring as Markdown; in a cell of a table it is one line."""
    text = text.replace("``", "`")
    if joined:
        return " ".join(text.split())
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
