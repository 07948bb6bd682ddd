"""Reads YAML with the scalars of YAML 1.2, without duplicate keys, and with the line of every key.

PyYAML follows YAML 1.1, where ``3e-4`` is text, ``no`` is False, ``010`` is eight and ``1:30`` is ninety. Nothing is evaluated.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import yaml

from runtime.errors import ConfigurationError, Problem

_MAX_DEPTH = 100
_MAX_VALUES = 100_000  # with aliases expanded

Lines = dict[tuple[str, ...], str]

_FLOAT = r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
_RESOLVERS = [  # the core schema, YAML 1.2.2 section 10.3.2; the first that matches counts
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?\d+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", _FLOAT, "-+.0123456789"),
    ("merge", r"<<", "<"),
]


class _Core:
    """The resolvers of YAML 1.2, for reading and writing."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {}


for _name, _pattern, _first in _RESOLVERS:
    for _character in _first:
        _Core.yaml_implicit_resolvers.setdefault(_character.replace("\0", ""), []).append(
            (f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"))
        )


class _Loader(_Core, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except ValueError as error:
            raise yaml.constructor.ConstructorError(None, None, str(error), node.start_mark) from error

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node)
        return int(text, {"0x": 16, "0o": 8}.get(text[:2], 10))


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


class _Dumper(_Core, yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def dump(values: Any) -> str:
    """Write plain data as YAML that :func:`read_file` reads back to the same values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def read_file(path: Path, lines: Lines) -> tuple[dict[str, Any], list[Problem]]:
    """Read a file whose content is a mapping; note the line of every key in ``lines``.

    Returns:
        the values, and mistakes that do not prevent reading the rest.

    Raises:
        ConfigurationError: the file cannot be read at all.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigurationError([Problem(str(path), "", f"cannot be read: {error.strerror}")]) from None
    except UnicodeDecodeError:
        raise ConfigurationError([Problem(str(path), "", "is not UTF-8 text")]) from None
    lines[()] = f"{path}:1"
    raw, problems = _read(text, lines, (), lambda line: f"{path}:{line}", str(path))
    if raw is None and not text.strip(" \n").startswith(("null", "~", "Null", "NULL")):
        raw = {}
    if not isinstance(raw, dict):
        raise ConfigurationError([Problem(f"{path}:1", "", "must be a mapping of keys to values")])
    return raw, problems


def read_value(text: str, lines: Lines, path: tuple[str, ...]) -> tuple[Any, list[Problem]]:
    """Read the value of an override; the location of every key within it is ``command line``.

    Raises:
        ConfigurationError: it is not YAML.
    """
    lines[path] = "command line"
    return _read(text, lines, path, lambda line: "command line", "command line")


def _read(
    text: str, lines: Lines, path: tuple[str, ...], where: Callable[[int], str], whole: str
) -> tuple[Any, list[Problem]]:
    problems: list[Problem] = []
    try:
        _refuse_bombs(text)
        loader = _Loader(text)  # reads the whole text for characters that YAML forbids
        try:
            node = loader.get_single_node()
            problems += _index(node, where, path, lines, ())
            if any(problem.what.startswith("contains itself") for problem in problems):
                raise ConfigurationError(problems)
            raw = loader.construct_document(node) if node is not None else None
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        position = getattr(error, "position", None)
        line = mark.line + 1 if mark else text[:position].count("\n") + 1 if position is not None else None
        reason = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
        place = where(line) if line is not None else whole
        raise ConfigurationError([Problem(place, ".".join(path), f"not YAML: {reason}")]) from None
    return _unshared(raw), problems


def _refuse_bombs(text: str) -> None:
    """Refuse small files that exhaust a parser: too deep nesting, and aliases of aliases (billion laughs).

    Raises:
        yaml.YAMLError: with the position.
    """
    anchors: dict[str, tuple[int, int]] = {}  # number of values and depth of each
    open_ones: list[tuple[str | None, int, int]] = []
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.CollectionStartEvent):
            open_ones.append((event.anchor, 1, 0))
            found = (0, 0)
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, size, levels = open_ones.pop()
            found = (size, levels + 1)
            anchors |= {anchor: found} if anchor is not None else {}
        elif isinstance(event, yaml.AliasEvent):
            found = anchors.get(event.anchor or "", (1, 0))
        else:
            found = (1, 0) if isinstance(event, yaml.ScalarEvent) else (0, 0)
        if open_ones:
            anchor, size, levels = open_ones[-1]
            open_ones[-1] = (anchor, size + found[0], max(levels, found[1]))
        if len(open_ones) + found[1] > _MAX_DEPTH:
            raise _marked(event, f"nested deeper than {_MAX_DEPTH} levels")
        if any(size > _MAX_VALUES for _, size, _ in open_ones[-1:]):
            raise _marked(event, f"its aliases expand to more than {_MAX_VALUES:,} values")


def _marked(event: yaml.Event, problem: str) -> yaml.MarkedYAMLError:
    mark: Any = event.start_mark
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


def _index(
    node: yaml.Node | None,
    where: Callable[[int], str],
    path: tuple[str, ...],
    lines: Lines,
    above: tuple[int, ...],
) -> Iterator[Problem]:
    if node is not None and id(node) in above:
        yield Problem(lines[path], ".".join(path), "contains itself (an alias within its own anchor)")
    elif isinstance(node, yaml.MappingNode):
        yield from _index_mapping(node, where, path, lines, (*above, id(node)))
    elif isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            lines[(*path, str(number))] = where(item.start_mark.line + 1)
            yield from _index(item, where, (*path, str(number)), lines, (*above, id(node)))


def _index_mapping(
    node: yaml.MappingNode,
    where: Callable[[int], str],
    path: tuple[str, ...],
    lines: Lines,
    above: tuple[int, ...],
) -> Iterator[Problem]:
    seen: dict[str, int] = {}
    kept = []
    for key_node, value_node in node.value:
        key, line = str(key_node.value), key_node.start_mark.line + 1
        if key in seen and key_node.tag != "tag:yaml.org,2002:merge":
            yield Problem(where(line), ".".join((*path, key)), f"written twice; first in line {seen[key]}")
        seen.setdefault(key, line)
        lines[(*path, key)] = where(line)
        text = key_node.tag in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")
        if isinstance(key_node, yaml.ScalarNode) and not text and "args" not in path:
            yield Problem(where(line), ".".join((*path, key)), "keys must be text")
            continue
        kept.append((key_node, value_node))
        yield from _index(value_node, where, (*path, key), lines, above)
    node.value = kept


def _unshared(value: Any) -> Any:
    """Copy values that aliases share, so that an override of one does not change the others."""
    if isinstance(value, dict):
        return {key: _unshared(inner) for key, inner in value.items()}
    return [_unshared(inner) for inner in value] if isinstance(value, list) else value
