"""A key of the configuration that names a class or a function, bound to where it stands: checked, built, and blamed.

What a kind of component needs beyond that (a loss, an optimizer, a metric) stands with its builder; ``components.py`` has the
table of all keys.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.config import component
from runtime.config.component import ComponentError
from runtime.config.locations import Locations
from runtime.errors import ConfigurationError, Problem


def call_mistakes(bound: Component, *, positional: int = 0) -> list[ComponentError]:
    """Compare the arguments of what is called once, when the run is built, with its signature.

    Args:
        positional: how many arguments the runtime gives before them.
    """
    return component.check(
        bound.target, bound.args, namespaces=bound.namespaces, code=bound.code, positional=positional
    )


def function_mistakes(bound: Component) -> list[ComponentError]:
    """Check what the runtime calls later. A function without arguments is used as it is: its signature says nothing."""
    try:
        found = bound.locate()
    except ComponentError as mistake:
        return [mistake]
    return call_mistakes(bound) if bound.args or inspect.isclass(found) else []


@dataclass(frozen=True)
class Component:
    """A target with its arguments, and the key it stands under.

    Args:
        key: of the section in the YAML.
        section: as it was written, with the keys beside ``target`` and ``args`` that some have.
        namespaces: modules in which a short name is looked up, in order.
        code: the folder of the user's own modules.
        where: where each key was written.
        mistakes: returns what is wrong with it, by its kind; calls nothing of the user's.
    """

    key: tuple[str, ...]
    section: Any
    namespaces: Sequence[str]
    code: Path
    where: Locations
    mistakes: Callable[[Component], Iterable[ComponentError]] = call_mistakes

    @property
    def target(self) -> str:
        """What names the class or function."""
        target: str = self.section.target
        return target

    @property
    def args(self) -> Mapping[str, Any]:
        """Keyword arguments, as they were written."""
        args: Mapping[str, Any] = self.section.args
        return args

    def check(self) -> list[Problem]:
        """Look it up and compare all arguments with signatures; nothing is called."""
        return [self.where.problem((*self.key, *m.path), m.what) for m in self.mistakes(self)]

    def locate(self) -> Any:
        """Return the class or function.

        Raises:
            ComponentError: there is none.
        """
        return component.locate(self.target, namespaces=self.namespaces, code=self.code)

    def build(self, *given: Any) -> Any:
        """Call it with what the runtime gives and the configured arguments.

        Raises:
            ConfigurationError: it cannot be found, or it raised.
        """
        with self.blamed():
            return component.build(self.target, self.args, *given, namespaces=self.namespaces, code=self.code)

    def function(self) -> Callable[..., Any]:
        """Return a function: a class is instantiated, a function with arguments makes one, another is used as it is.

        Raises:
            ConfigurationError: it cannot be found, it raised, or what it made cannot be called.
        """
        with self.blamed():
            found = self.locate()
        made = self.build() if inspect.isclass(found) or self.args else found
        if not callable(made):
            raise self.error(f"is a {type(made).__name__}, which cannot be called", "target")
        called: Callable[..., Any] = made
        return called

    def error(self, what: str, *inner: str) -> ConfigurationError:
        """Make an error of this component, or of a key within it."""
        return self.where.error((*self.key, *inner), what)

    def blamed(self) -> AbstractContextManager[None]:
        """Return a context in which a :class:`ComponentError` is raised as an error of this key."""
        return self.where.blamed(*self.key)
