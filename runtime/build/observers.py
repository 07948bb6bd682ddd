"""Builds the observers of a run: those of ``reporting.observers``, then those passed to :func:`lockstep.train`."""

from __future__ import annotations

from collections.abc import Sequence

from runtime.build.components import Components
from runtime.errors import ConfigurationError, Problem
from runtime.training.observers import NamedObserver, Observer


def build_observers(components: Components, observers: Sequence[Observer]) -> tuple[NamedObserver, ...]:
    """Build the YAML's observers and append ``observers``; classes are instantiated, functions used as they are.

    Raises:
        ConfigurationError: one cannot be built, or is not callable.
    """
    bound = components.below("reporting", "observers").values()
    built = [NamedObserver(observer.target, observer.function()) for observer in bound]
    wrong = [observer for observer in observers if not callable(observer)]
    if wrong:
        raise ConfigurationError(
            [Problem("train()", "observers", f"{observer!r} cannot be called with a StepReport") for observer in wrong]
        )
    return (*built, *map(NamedObserver.of, observers))
