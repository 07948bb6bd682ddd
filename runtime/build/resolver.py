"""One component of the configuration, built; mistakes come back with file, line and key."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from runtime.config import component
from runtime.config.component import ComponentError
from runtime.config.file import LoadedConfiguration
from runtime.config.types import ComponentSection
from runtime.errors import ConfigurationError, Problem


def build(
    loaded: LoadedConfiguration,
    key: tuple[str, ...],
    section: ComponentSection,
    *given: Any,
    namespaces: Sequence[str] = (),
    extra: Mapping[str, Any] | None = None,
) -> Any:
    """Call a component with what the runtime gives and the configured arguments.

    Raises:
        ConfigurationError: it cannot be found, or it raised.
    """
    arguments = {**section.args, **(extra or {})}
    try:
        return component.build(section.target, arguments, *given, namespaces=namespaces, code=loaded.code)
    except ComponentError as mistake:
        raise wrong(loaded, key + mistake.path, mistake.what) from mistake


def function(
    loaded: LoadedConfiguration,
    key: tuple[str, ...],
    section: ComponentSection,
    *,
    namespaces: Sequence[str] = (),
) -> Callable[..., Any]:
    """A class is instantiated; a function without arguments is taken as it is, with arguments it makes the function."""
    try:
        found = component.locate(section.target, namespaces=namespaces, code=loaded.code)
    except ComponentError as mistake:
        raise wrong(loaded, key + mistake.path, mistake.what) from mistake
    made = build(loaded, key, section, namespaces=namespaces) if inspect.isclass(found) or section.args else found
    if not callable(made):
        raise wrong(loaded, (*key, "target"), f"is a {type(made).__name__}, which cannot be called")
    called: Callable[..., Any] = made
    return called


def wrong(loaded: LoadedConfiguration, key: tuple[str, ...], what: str) -> ConfigurationError:
    """Make an error of a key that is wrong, with the line it was written in."""
    problem: Problem = loaded.problem(key, what)
    return ConfigurationError([problem])


@contextmanager
def located(loaded: LoadedConfiguration) -> Iterator[None]:
    """Add file and line to mistakes that are found by parts which know the key alone, such as strategies."""
    try:
        yield
    except ConfigurationError as error:
        problems = [
            loaded.problem(problem.key.split("."), problem.what) if problem.where == "configuration" else problem
            for problem in error.problems
        ]
        if problems == error.problems:
            raise
        raise ConfigurationError(problems) from error
