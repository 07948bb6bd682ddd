"""Loads a checked configuration from a YAML file and overrides; every mistake is reported with file, line and key.

Precedence, lowest first: defaults, YAML, ``key.path=value``. Imports no torch, so that a login node can check a file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.json_schema import GenerateJsonSchema

from runtime.config.locations import Locations, location
from runtime.config.metric_tasks import with_tasks
from runtime.config.output_name import TemplateError, escaped, filled
from runtime.config.plain import ContainsItselfError, plain, put
from runtime.config.sections import RunConfiguration
from runtime.config.types import Duration, Interval
from runtime.config.yaml_file import read_file, read_value
from runtime.config.zero_rules import zero_problems
from runtime.errors import ConfigurationError, Problem
from runtime.run_files import RunFiles
from runtime.wording import did_you_mean

_YES_AND_NO = ("yes", "no", "on", "off")
HIDDEN = "(hidden)"
SECRET_ENDINGS = ("KEY", "TOKEN", "SECRET", "PASSWORD")


@dataclass(frozen=True)
class LoadedConfiguration:
    """A checked configuration, with the location of each key."""

    values: RunConfiguration
    source: Path | None
    lines: Mapping[tuple[str, ...], str]

    @property
    def name(self) -> str:
        """The run's name. Default: the file's name without its suffix."""
        return self.values.name or (self.source.stem if self.source else "run")

    @property
    def output(self) -> Path:
        """The run folder."""
        return Path(filled(self.values.output, {**self.values.model_dump(), "name": self.name}))

    @property
    def code(self) -> Path:
        """The folder of the user's own modules."""
        base = self.where.folder
        return (base / self.values.code).resolve() if self.values.code else base

    @property
    def where(self) -> Locations:
        """Where each key was written."""
        return Locations(self.lines, self.source.resolve().parent if self.source else Path.cwd())

    def resolved(self) -> dict[str, Any]:
        """Return all keys with their values as written to the run folder: with defaults, secrets hidden."""
        values: dict[str, Any] = without_secrets(self.values.model_dump())
        return {**values, "name": self.name}


def load(source: Path | str | Mapping[str, Any], overrides: Sequence[str] = ()) -> LoadedConfiguration:
    """Read a configuration from a YAML file (or a mapping), apply ``key.path=value`` overrides and check the structure.

    Raises:
        ConfigurationError: every mistake found, each with file, line and key.
    """
    lines: dict[tuple[str, ...], str] = {}
    path: Path | None = None
    texts: dict[tuple[str, ...], str] = {}
    if isinstance(source, Mapping):
        lines[()] = "configuration"
        try:
            raw: Any = plain(source, texts)
        except ContainsItselfError as error:
            raise ConfigurationError([Problem("configuration", str(error), "contains itself")]) from None
        problems = list(_refuse_objects(raw, (), lines))
    else:
        path = Path(source)
        raw, problems = read_file(path, lines)
    problems += _apply_overrides(raw, overrides, lines)
    try:
        values = _validated(raw, {at: text for at, text in texts.items() if location(lines, at) != "command line"})
    except ValidationError as error:
        problems += [problem for detail in error.errors() for problem in _explain(detail, lines)]
    if problems:
        raise ConfigurationError(problems)
    values = with_tasks(values)
    loaded = LoadedConfiguration(values, path, lines)
    problems = [
        *zero_problems(values, loaded.where.of, loaded.where.beside),
        *(loaded.where.problem(("output",), what) for what in _wrong_output(values.output, lambda: loaded.output)),
        *_wrong_changes(values.resume.allow_changes, loaded.where),
    ]
    if problems:
        raise ConfigurationError(problems)
    return loaded


def load_run(source: Path | str | Mapping[str, Any], overrides: Sequence[str] = ()) -> LoadedConfiguration:
    """Like :func:`load`; also accepts a run folder, with the configuration that the run was last started with.

    Raises:
        ConfigurationError: every mistake found; or the folder is not a run folder, or its configuration hides a secret.
    """
    if isinstance(source, Mapping) or not Path(source).is_dir():
        return load(source, overrides)
    path = RunFiles(Path(source)).config
    if not path.is_file():
        problem = f"is a folder without a {path.name}: give a run folder or a YAML file"
        raise ConfigurationError([Problem(str(source), "", problem)])
    if any(override.partition("=")[0] == "output" for override in overrides):
        raise ConfigurationError(
            [Problem("command line", "output", f"is {source}; leave it out, or give the YAML file")]
        )
    loaded = load(path, overrides)
    hidden = [key for key, value in flatten(loaded.values.model_dump()).items() if value == HIDDEN]
    if hidden:
        what = f"is a secret, which run folders do not store: give {hidden[0]}=…, or the run's original YAML file"
        raise ConfigurationError([loaded.where.problem(key.split("."), what) for key in hidden])
    return replace(loaded, values=loaded.values.model_copy(update={"output": escaped(str(source))}))


def _wrong_output(written: str, fill: Callable[[], Path]) -> Iterator[str]:
    try:
        folder = str(fill())
    except TemplateError as error:
        yield str(error)
        return
    if not written.strip() or not folder.strip():
        yield "is empty; give each run a separate folder, such as runs/{name}"
    elif "\0" in folder:
        yield "has a character that no path can have (NUL)"
    elif Path(folder).resolve() == Path(folder).resolve().parent:
        yield f"is {folder}, the root directory; give each run a separate folder, such as runs/{{name}}"


def _wrong_changes(changes: Sequence[str], where: Locations) -> Iterator[Problem]:
    """Yield a problem for each entry of ``resume.allow_changes`` that is not a key."""
    for number, change in enumerate(changes):
        what = _unknown_change(tuple(change.split(".")))
        if what is not None:
            yield where.problem(("resume", "allow_changes", str(number)), what)


def _unknown_change(path: tuple[str, ...]) -> str | None:
    section: type[BaseModel] = RunConfiguration
    for depth, key in enumerate(path):
        field = section.model_fields.get(key)
        if field is None:
            return f"there is no key {'.'.join(path)!r}{_suggest(path[: depth + 1])}"
        rest, inner = path[depth + 1 :], _section_in(field.annotation)
        if not rest or _is_mapping(field.annotation):
            return None  # keys below are the user's: arguments, losses, metrics
        if inner is None or _is_container(field.annotation):
            return f"{'.'.join(path)!r} is within a value that is compared as a whole; give {'.'.join(path[: depth + 1])!r}"
        section = inner
    return None


def exact_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten resolved values to the keys that determine the run's result."""
    free_keys = set(_free_paths(RunConfiguration))
    if (values.get("schedule") or {}).get("monitor"):
        free_keys -= {"evaluation.every"}  # a plateau scheduler counts evaluations
    return {
        key: value for key, value in flatten(values).items() if not any(_under(key, prefix) for prefix in free_keys)
    }


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings to dotted keys; lists and empty mappings stay values."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def without_secrets(value: Any) -> Any:
    """Copy nested values, hiding those whose key ends in one of ``SECRET_ENDINGS``."""
    if isinstance(value, Mapping):
        return {
            key: HIDDEN
            if isinstance(inner, str) and str(key).upper().endswith(SECRET_ENDINGS)
            else without_secrets(inner)
            for key, inner in value.items()
        }
    return [without_secrets(inner) for inner in value] if isinstance(value, list) else value


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of the YAML, for editors."""
    schema = RunConfiguration.model_json_schema(schema_generator=_AsWritten)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


class _AsWritten(GenerateJsonSchema):
    """Generates a schema with defaults as written in YAML, such as ``1 epoch``."""

    def encode_default(self, dft: Any) -> Any:
        """Return a default as plain data."""
        return str(dft) if isinstance(dft, Interval | Duration) else super().encode_default(dft)


def _apply_overrides(raw: Any, overrides: Sequence[str], lines: dict[tuple[str, ...], str]) -> list[Problem]:
    problems = []
    for override in overrides:
        key, equals, text = override.removeprefix("--").partition("=")
        path = tuple(key.split("."))
        if not equals or not all(path):
            problems.append(Problem("command line", "", f"{override!r} is not of the form key.path=value"))
            continue
        for replaced in [at for at in lines if at[: len(path)] == path]:
            del lines[replaced]
        try:
            value, value_problems = read_value(text, lines, path)
        except ConfigurationError as error:
            problems += error.problems
            continue
        problems += value_problems
        if not _set(raw, path, value, lines):
            problems.append(Problem("command line", key, "leads into a value that has no such key"))
    return problems


def _set(raw: Any, path: tuple[str, ...], value: Any, lines: dict[tuple[str, ...], str]) -> bool:
    for depth, key in enumerate(path[:-1], start=1):
        if isinstance(raw, list) and key.isdigit() and int(key) < len(raw):
            raw = raw[int(key)]
        elif isinstance(raw, dict):
            if raw.get(key) is None:
                raw[key] = {}
                lines[path[:depth]] = "command line"
            raw = raw[key]
        else:
            return False
    if isinstance(raw, list) and path[-1].isdigit() and int(path[-1]) < len(raw):
        raw[int(path[-1])] = value
    elif isinstance(raw, dict):
        raw[path[-1]] = value
    else:
        return False
    return True


def _refuse_objects(value: Any, path: tuple[str, ...], lines: Mapping[tuple[str, ...], str]) -> Iterator[Problem]:
    """Refuse Python objects that YAML cannot represent: the run folder could not record them."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _refuse_objects(inner, (*path, str(key)), lines)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _refuse_objects(inner, (*path, str(index)), lines)
    elif not (value is None or isinstance(value, bool | int | float | str)):
        what = f"is a {type(value).__name__}; give it as a target, 'package.module:Name'"
        yield Problem(location(lines, path), ".".join(path), what)


def _explain(detail: Any, lines: Mapping[tuple[str, ...], str]) -> Iterator[Problem]:
    path = tuple(str(part) for part in detail["loc"])
    kind, value = detail["type"], detail.get("input")
    if kind == "combinations":
        for key, what in detail["ctx"]["found"]:
            full = (*path, *key.split(".")) if key else path
            yield Problem(location(lines, full), ".".join(full), what)
        return
    if kind == "extra_forbidden":
        what = f"unknown key{_suggest(path)}"
    elif kind == "missing":
        what = "is required"
    elif kind == "bool_type":
        what = f"must be true or false, not {_shown(value)}"
        if isinstance(value, str) and value.lower() in _YES_AND_NO:
            what += f" (YAML 1.2: {value} is text)"
    elif kind == "interval":
        what = f"{detail['msg']}, not {_shown(value)}"
    elif kind in ("model_type", "model_attributes_type", "dict_type"):
        what = f"must be a section (a mapping of keys), not {_shown(value)}"
        if isinstance(value, str) and value.lower() in _YES_AND_NO:
            what += f" (true or false may replace a section; YAML 1.2: {value} is text)"
    else:
        message = detail["msg"].replace("Input should be", "must be").replace("Value error, ", "")
        what = f"{message[0].lower()}{message[1:]}, not {_shown(value)}"
    yield Problem(location(lines, path), ".".join(path), what)


def _shown(value: Any) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _suggest(path: tuple[str, ...]) -> str:
    section: type[BaseModel] | None = RunConfiguration
    parts = list(path[:-1])
    while parts and section is not None:
        field = section.model_fields.get(parts.pop(0))
        section = _section_in(field.annotation) if field else None
        if field is not None and _is_container(field.annotation) and parts:
            parts.pop(0)  # the index or name of an entry
    siblings = list(section.model_fields) if section else []
    near = did_you_mean(path[-1], siblings)
    if near:
        return near
    elsewhere = [key for key in _all_paths(RunConfiguration) if key.split(".")[-1] == path[-1]]
    if elsewhere:
        return f"; did you mean {min(elsewhere, key=lambda key: key.count('.'))!r}?"
    return f"; known here: {', '.join(siblings)}" if siblings else ""


def _is_container(annotation: Any) -> bool:
    return get_origin(annotation) in (list, dict)


def _is_mapping(annotation: Any) -> bool:
    return get_origin(annotation) is dict or any(map(_is_mapping, getattr(annotation, "__args__", ())))


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        section = _section_in(argument)
        if section is not None:
            return section
    return None


def _all_paths(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for key, field in section.model_fields.items():
        yield prefix + key
        inner = _section_in(field.annotation)
        if inner is not None:
            yield from _all_paths(inner, f"{prefix}{key}.")


def _free_paths(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for key, field in section.model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("resume") == "free":
            yield prefix + key
            continue
        inner = _section_in(field.annotation)
        if inner is not None:
            yield from _free_paths(inner, f"{prefix}{key}.")


def _under(key: str, prefix: str) -> bool:
    return key == prefix or key.startswith(prefix + ".")


def _validated(raw: Any, texts: Mapping[tuple[str, ...], str]) -> RunConfiguration:
    """Validate; where a key takes only text, restore text that was parsed as a number."""
    try:
        return RunConfiguration.model_validate(raw)
    except ValidationError as error:
        refused = [tuple(map(str, detail["loc"])) for detail in error.errors()]
    for path in [path for path in texts if any(key[: len(path)] == path for key in refused)]:
        put(raw, path, texts[path])
    return RunConfiguration.model_validate(raw)
