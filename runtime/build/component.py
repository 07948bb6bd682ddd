"""A component (a key that names a class or a function) bound to its key: checks it, builds it, and raises errors at that key.

Checks of one kind of component (loss, optimizer, metric) are in its builder; ``components.py`` has the table of all keys.
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
    """Check the arguments of a component that is called once, when the run is built, against its signature.

    Args:
        positional: number of positional arguments that the runtime passes.
    """
    return component.check(
        bound.target, bound.args, namespaces=bound.namespaces, code=bound.code, positional=positional
    )


def function_mistakes(bound: Component) -> list[ComponentError]:
    """Check a component that the runtime calls later. A function without arguments is not called now, so is not checked."""
    try:
        located = bound.locate()
    except ComponentError as mistake:
        return [mistake]
    return call_mistakes(bound) if bound.args or inspect.isclass(located) else []


@dataclass(frozen=True)
class Component:
    """A target with its arguments and its key.

    Args:
        key: of the section in the YAML.
        section: as written; may have keys in addition to ``target`` and ``args``.
        namespaces: modules in which a short name is looked up, in order.
        code: the folder of the user's own modules.
        where: where each key was written.
        mistakes: the check of this kind of component; calls no user code.
    """

    key: tuple[str, ...]
    section: Any
    namespaces: Sequence[str]
    code: Path
    where: Locations
    mistakes: Callable[[Component], Iterable[ComponentError]] = call_mistakes

    @property
    def target(self) -> str:
        """The name of the class or function."""
        target: str = self.section.target
        return target

    @property
    def args(self) -> Mapping[str, Any]:
        """The keyword arguments, as written."""
        args: Mapping[str, Any] = self.section.args
        return args

    def check(self) -> list[Problem]:
        """Look up the target and check all arguments against signatures; nothing is called."""
        return [self.where.problem((*self.key, *m.path), m.what) for m in self.mistakes(self)]

    def locate(self) -> Any:
        """Return the class or function.

        Raises:
            ComponentError: it cannot be found.
        """
        return component.locate(self.target, namespaces=self.namespaces, code=self.code)

    def build(self, *positional: Any) -> Any:
        """Call the target with positional arguments from the runtime and the configured keyword arguments.

        Raises:
            ConfigurationError: it cannot be found, or it raised.
        """
        with self.errors_at_key():
            return component.build(self.target, self.args, *positional, namespaces=self.namespaces, code=self.code)

    def function(self) -> Callable[..., Any]:
        """Return a callable: an instance of a class, the result of a function with arguments, or the function itself.

        Raises:
            ConfigurationError: it cannot be found, it raised, or the result is not callable.
        """
        with self.errors_at_key():
            located = self.locate()
        built = self.build() if inspect.isclass(located) or self.args else located
        if not callable(built):
            raise self.error(f"is a {type(built).__name__}, which cannot be called", "target")
        function: Callable[..., Any] = built
        return function

    def error(self, what: str, *inner: str) -> ConfigurationError:
        """Return an error at this component's key, or at a key within it."""
        return self.where.error((*self.key, *inner), what)

    def errors_at_key(self) -> AbstractContextManager[None]:
        """Return a context that reraises a :class:`ComponentError` as a ConfigurationError at this key."""
        return self.where.errors_at(*self.key)
