"""The observers of a run: those of ``reporting.observers``, then those that :func:`lockstep.train` was given."""

from __future__ import annotations

from collections.abc import Sequence

from runtime.build.components import Components
from runtime.errors import ConfigurationError, Problem
from runtime.training.observers import NamedObserver, Observer


def build_observers(components: Components, given: Sequence[Observer]) -> tuple[NamedObserver, ...]:
    """Build the YAML's observers and name the given ones; a class is instantiated, a function is taken as it is.

    Raises:
        ConfigurationError: one cannot be built, or cannot be called.
    """
    bound = components.below("reporting", "observers").values()
    built = [NamedObserver(observer.target, observer.function()) for observer in bound]
    wrong = [observer for observer in given if not callable(observer)]
    if wrong:
        raise ConfigurationError(
            [Problem("train()", "observers", f"{observer!r} cannot be called with a StepReport") for observer in wrong]
        )
    return (*built, *map(NamedObserver.of, given))
