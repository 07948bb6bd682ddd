"""Who holds the others up, told once until another does."""

from __future__ import annotations

from collections.abc import Mapping

from runtime.evaluation.metrics import Result

_EXCESS = 0.2  # of the time between two reports; less is noise, and so is what shorter times tell
_LEAST_SECONDS = 1.0


class Stragglers:
    """Judges the figures of each report."""

    def __init__(self) -> None:
        self._named: Result | None = None

    def message(self, figures: Mapping[str, Result], seconds: float) -> str | None:
        """Return what to tell of the slowest rank, or None if there is nothing new.

        Args:
            figures: of a report; see :mod:`runtime.reporting.meters`.
            seconds: between this report and the last.
        """
        excess = figures.get("slowest_rank_excess", 0.0)
        if not isinstance(excess, float) or excess <= _EXCESS or seconds <= _LEAST_SECONDS:
            return None
        if figures["slowest_rank"] == self._named:
            return None
        self._named = figures["slowest_rank"]
        return (
            f"rank {self._named:g} holds the others up: of the last steps' time it was busy with its own data and "
            f"forward passes {excess:.0%} more than the middle rank"
        )
