"""Locations of the keys of a configuration, for error messages with file and line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from runtime.config.component import ComponentError
from runtime.errors import ConfigurationError, Problem

UNKNOWN = "configuration"


def location(lines: Mapping[tuple[str, ...], str], key: tuple[str, ...]) -> str:
    """Return the location of a key, or else of the nearest key above it."""
    while key and key not in lines:
        key = key[:-1]
    return lines.get(key, UNKNOWN)


@dataclass(frozen=True)
class Locations:
    """The location of each key, and the base folder of relative paths in the configuration.

    Args:
        lines: ``file:line``, ``command line`` or ``configuration``, by key.
        folder: of the YAML file, or the working folder if there is none.
    """

    lines: Mapping[tuple[str, ...], str]
    folder: Path

    def of(self, key: Sequence[str]) -> str:
        """Return the location of a key."""
        return location(self.lines, tuple(key))

    def problem(self, key: Sequence[str], what: str) -> Problem:
        """Return a problem at a key's location."""
        return Problem(self.of(key), ".".join(key), what)

    def error(self, key: Sequence[str], what: str) -> ConfigurationError:
        """Return an error with one problem at a key's location."""
        return ConfigurationError([self.problem(key, what)])

    def beside(self, path: str) -> Path:
        """Resolve a path of the configuration relative to the YAML file."""
        return self.folder / Path(path).expanduser()

    @contextmanager
    def errors_at(self, *key: str) -> Iterator[None]:
        """Reraise a :class:`ComponentError` as a ConfigurationError at a key."""
        try:
            yield
        except ComponentError as mistake:
            raise self.error((*key, *mistake.path), mistake.what) from mistake

    @contextmanager
    def completed(self) -> Iterator[None]:
        """Add file and line to errors raised with only a key, such as by strategies."""
        try:
            yield
        except ConfigurationError as error:
            problems = [
                self.problem(problem.key.split("."), problem.what) if problem.where == UNKNOWN else problem
                for problem in error.problems
            ]
            if problems == error.problems:
                raise
            raise ConfigurationError(problems) from error
