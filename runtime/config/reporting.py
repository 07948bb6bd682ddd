"""The section of what a run reports while it goes on, and where to. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from runtime.config.types import ON_OR_OFF, Component, Every, Interval, Section, free


class WeightsAndBiasesSection(Section):
    """Weights & Biases, written by rank 0 alone."""

    mode: Literal["online", "offline", "disabled"] | None = free(None)
    """Default: online where an API key is found, otherwise offline."""
    project: str = free("lockstep")
    """Project the run belongs to."""
    entity: str | None = free(None)
    """User or team. Default: that of the API key."""
    tags: list[str] = free([])
    """Labels of the run."""


class ReportingSection(Section):
    """What is told while the run goes on."""

    every: Every = free(Interval(50, "step"))
    """How often the training loss is read from the device and reported."""
    progress: bool = free(True)
    """A progress bar where the output is a terminal, plain lines elsewhere."""
    observers: list[Component] = free([])
    """Functions, or classes whose instances can be called, that get a ``StepReport`` after each step, on every rank. They see
    plain values alone and change nothing; what one raises ends the run. Default: none."""
    wandb: Annotated[WeightsAndBiasesSection | None, ON_OR_OFF] = free(None)
    """Weights & Biases; ``true`` takes the defaults. Default: off."""
    trackers: list[Component] = free([])
    """Trackers of your own: classes that extend ``lockstep.Tracker``, made and called on rank 0 alone. One that raises is
    warned of and left out; the run goes on."""
