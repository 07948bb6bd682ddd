"""Building blocks of the configuration's sections: base model, intervals, shorthands, rules between keys. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    PlainSerializer,
    WithJsonSchema,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from runtime.config.signatures import class_name


def free(default: Any) -> Any:
    """Return a field with a default that may change when a run is resumed."""
    return Field(default, json_schema_extra={"resume": "free"})


class Section(BaseModel):
    """A section of the YAML: frozen, strictly typed, without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


_S = TypeVar("_S", bound=Section)


def refuse(section: _S, *rules: tuple[Any, str, str]) -> _S:
    """Return the section, or raise an error with all broken rules: (broken, key, message)."""
    found = [(key, what) for broken, key, what in rules if broken]
    if found:
        raise PydanticCustomError("combinations", "{found}", {"found": found})
    return section


@dataclass(frozen=True)
class Interval:
    """How often something happens, counted in steps or in epochs."""

    count: int
    unit: Literal["step", "epoch"]

    def __str__(self) -> str:
        return f"{self.count} {self.unit}{'s' * (self.count != 1)}"

    def due(self, *, step: int, epoch: int, epoch_ends: bool) -> bool:
        """Return whether it is due after step ``step`` of epoch ``epoch`` (both counted from 1)."""
        if self.unit == "step":
            return step % self.count == 0
        return epoch_ends and epoch % self.count == 0

    def reached(self, *, steps: int, epochs: int) -> bool:
        """Return whether the interval is over after the given numbers of steps and epochs."""
        return (steps if self.unit == "step" else epochs) >= self.count

    @classmethod
    def parse(cls, value: Any) -> Any:
        """Parse ``"200 steps"`` or ``"1 epoch"``."""
        if isinstance(value, cls):
            return value
        match = re.fullmatch(r"([1-9]\d*) (step|epoch)s?", value) if isinstance(value, str) else None
        if match is None:
            raise PydanticCustomError("interval", "write a count and a unit, such as '200 steps' or '1 epoch'")
        return cls(int(match[1]), "step" if match[2] == "step" else "epoch")


Every = Annotated[
    Interval,
    BeforeValidator(Interval.parse),
    PlainSerializer(str, return_type=str),
    WithJsonSchema({"type": "string", "pattern": r"^[1-9]\d* (step|epoch)s?$", "examples": ["1 epoch", "200 steps"]}),
]


@dataclass(frozen=True)
class Duration:
    """A duration in whole seconds."""

    seconds: int

    def __str__(self) -> str:
        hours, rest = divmod(self.seconds, 3600)
        parts = ((hours, "h"), (rest // 60, "m"), (rest % 60, "s"))
        return "".join(f"{count}{unit}" for count, unit in parts if count)

    @classmethod
    def parse(cls, value: Any) -> Any:
        """Parse ``"3h55m"``, ``"90m"`` or ``"1d12h30m15s"``."""
        if isinstance(value, cls):
            return value
        match = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", value) if isinstance(value, str) else None
        seconds = (
            sum(int(n or 0) * unit for n, unit in zip(match.groups(), (86400, 3600, 60, 1), strict=True))
            if match
            else 0
        )
        if seconds == 0:
            raise PydanticCustomError("duration", "write a duration, such as '3h55m', '90m' or '1d12h'")
        return cls(seconds)


Time = Annotated[
    Duration,
    BeforeValidator(Duration.parse),
    PlainSerializer(str, return_type=str),
    WithJsonSchema({"type": "string", "pattern": r"^(\d+d)?(\d+h)?(\d+m)?(\d+s)?$", "examples": ["3h55m", "90m"]}),
]


@dataclass(frozen=True, eq=False)  # hashed by identity: typing puts annotations into sets
class Shorthand:
    """A second way to write a section, for the loader (``expand``) and for editors (``schema``)."""

    expand: Callable[[Any], Any]
    schema: dict[str, Any]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Expand before the section is validated."""
        return core_schema.no_info_before_validator_function(self.expand, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Allow both forms."""
        return {"anyOf": [handler(schema), self.schema]}


TARGET_ALONE = Shorthand(lambda value: {"target": value} if isinstance(value, str) else value, {"type": "string"})
"""A component's target may be written alone."""
ON_OR_OFF = Shorthand(lambda value: {} if value is True else None if value is False else value, {"type": "boolean"})
"""A section may be true (its defaults) or false (none)."""

_WORD_BOUNDARIES = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[0-9])(?=[A-Z][a-z])|(?<=[A-Z])(?=[A-Z][a-z])")


def _refused(what: str) -> PydanticCustomError:
    return PydanticCustomError("combinations", "{found}", {"found": [("", what)]})


def _named_by_class(value: Any) -> Any:
    """Convert a list of components to a mapping, each named after its class."""
    if not isinstance(value, list):
        return value
    named: dict[str, Any] = {}
    for entry in value:
        target = entry.get("target") if isinstance(entry, dict) else entry
        if not isinstance(target, str) or not target:
            raise _refused("a list holds classes, each NAME or {target: NAME, args: {…}}")
        if target == class_name(target) and not target[0].isupper():
            return value  # names of results, not classes: validation then asks for a mapping
        name = _WORD_BOUNDARIES.sub("_", class_name(target)).lower()
        if name in named:
            raise _refused(
                f"{target} is in the list twice; give a mapping with a name for each instead: "
                f"{{first: {{target: {target}, args: {{…}}}}, second: {{target: {target}, args: {{…}}}}}}"
            )
        named[name] = entry
    return named


NAMED_BY_CLASS = Shorthand(
    _named_by_class, {"type": "array", "items": {"anyOf": [{"type": "string"}, {"type": "object"}]}}
)
"""A mapping of names to components may be a list of components."""


class ComponentSection(Section):
    """A class or function and the arguments it is called with."""

    target: str = Field(min_length=1)
    """``package.module:Name``, or a short name of torch, torchmetrics or Lockstep."""
    args: dict[str, Any] = {}
    """Keyword arguments, checked against the signature. ``{target, args}`` within them is a nested component."""


Component = Annotated[ComponentSection, TARGET_ALONE]
