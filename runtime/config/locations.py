"""Where the keys of a configuration were written: what turns "this key is wrong" into a message with file and line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from runtime.config.component import ComponentError
from runtime.errors import ConfigurationError, Problem

UNKNOWN = "configuration"


def location(lines: Mapping[tuple[str, ...], str], key: tuple[str, ...]) -> str:
    """Return where a key was written, or else the nearest one above it."""
    while key and key not in lines:
        key = key[:-1]
    return lines.get(key, UNKNOWN)


@dataclass(frozen=True)
class Locations:
    """The place of each key, and the folder that relative paths in the configuration are relative to.

    Args:
        lines: by key, file and line, ``command line`` or ``configuration``.
        folder: of the YAML file, or the working folder where there is none.
    """

    lines: Mapping[tuple[str, ...], str]
    folder: Path

    def of(self, key: Sequence[str]) -> str:
        """Return where a key was written."""
        return location(self.lines, tuple(key))

    def problem(self, key: Sequence[str], what: str) -> Problem:
        """Make a problem out of a key that is wrong, with the line it was written in."""
        return Problem(self.of(key), ".".join(key), what)

    def error(self, key: Sequence[str], what: str) -> ConfigurationError:
        """Make an error of one key that is wrong."""
        return ConfigurationError([self.problem(key, what)])

    def beside(self, path: str) -> Path:
        """Return a path that was written in the configuration: relative ones are relative to the YAML file."""
        return self.folder / Path(path).expanduser()

    @contextmanager
    def errors_at(self, *key: str) -> Iterator[None]:
        """Raise mistakes of a component as errors of the key that it stands under."""
        try:
            yield
        except ComponentError as mistake:
            raise self.error((*key, *mistake.path), mistake.what) from mistake

    @contextmanager
    def completed(self) -> Iterator[None]:
        """Add file and line to errors of parts that know the key alone, such as strategies."""
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
