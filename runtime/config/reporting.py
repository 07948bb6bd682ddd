"""The section on a run's reports and trackers. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from runtime.config.types import ON_OR_OFF, Component, Every, Interval, Section, free


class WeightsAndBiasesSection(Section):
    """Weights & Biases, written by rank 0 only."""

    mode: Literal["online", "offline", "disabled"] | None = free(None)
    """Default: online if an API key is found, otherwise offline."""
    project: str = free("lockstep")
    """Project of the run."""
    entity: str | None = free(None)
    """User or team. Default: that of the API key."""
    tags: list[str] = free([])
    """Labels of the run."""


class ReportingSection(Section):
    """Reports during the run."""

    every: Every = free(Interval(50, "step"))
    """How often the training loss is read from the device and reported."""
    progress: bool = free(True)
    """A progress bar if the output is a terminal, otherwise plain lines."""
    observers: list[Component] = free([])
    """Functions, or classes with callable instances, that get a ``StepReport`` after each step, on every rank. They receive
    only plain values and change nothing; an exception in one ends the run. Default: none."""
    wandb: Annotated[WeightsAndBiasesSection | None, ON_OR_OFF] = free(None)
    """Weights & Biases; ``true`` uses the defaults. Default: off."""
    trackers: list[Component] = free([])
    """Custom trackers: classes that extend ``lockstep.Tracker``, built and called on rank 0 only. One that raises is disabled
    with a warning; the run continues."""
