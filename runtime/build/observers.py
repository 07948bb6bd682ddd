"""The observers of a run: those of ``reporting.observers``, then those that :func:`lockstep.train` was given."""

from __future__ import annotations

from collections.abc import Sequence

from runtime.build import resolver
from runtime.config.file import LoadedConfiguration
from runtime.config.types import ComponentSection
from runtime.errors import ConfigurationError, Problem
from runtime.training.observers import NamedObserver, Observer


def observer_sections(loaded: LoadedConfiguration) -> list[tuple[tuple[str, ...], ComponentSection]]:
    """Return the sections of the YAML's observers, each with its key."""
    sections = loaded.values.reporting.observers
    return [(("reporting", "observers", str(number)), section) for number, section in enumerate(sections)]


def build_observers(loaded: LoadedConfiguration, given: Sequence[Observer]) -> tuple[NamedObserver, ...]:
    """Build the YAML's observers and name the given ones; a class is instantiated, a function is taken as it is.

    Raises:
        ConfigurationError: one cannot be built, or cannot be called.
    """
    built = [
        NamedObserver(section.target, resolver.function(loaded, key, section))
        for key, section in observer_sections(loaded)
    ]
    wrong = [observer for observer in given if not callable(observer)]
    if wrong:
        raise ConfigurationError(
            [Problem("train()", "observers", f"{observer!r} cannot be called with a StepReport") for observer in wrong]
        )
    return (*built, *map(NamedObserver.of, given))
