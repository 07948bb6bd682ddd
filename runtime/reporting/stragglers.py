"""Warns of a straggler, once until the slowest rank changes."""

from __future__ import annotations

from collections.abc import Mapping

from runtime.evaluation.metrics import Result

_EXCESS = 0.2  # share of the time between two reports; less is noise, as is any excess over shorter times
_LEAST_SECONDS = 1.0


class Stragglers:
    """Detects stragglers in the figures of each report."""

    def __init__(self) -> None:
        self._reported: Result | None = None

    def message(self, figures: Mapping[str, Result], seconds: float) -> str | None:
        """Return a warning about the slowest rank, or None if there is nothing new.

        Args:
            figures: of a report; see :mod:`runtime.reporting.meters`.
            seconds: between this report and the last.
        """
        excess = figures.get("slowest_rank_excess", 0.0)
        if not isinstance(excess, float) or excess <= _EXCESS or seconds <= _LEAST_SECONDS:
            return None
        if figures["slowest_rank"] == self._reported:
            return None
        self._reported = figures["slowest_rank"]
        return (
            f"rank {self._reported:g} is the slowest: it spent {excess:.0%} more of the last steps' time than the median "
            "rank on data loading and forward passes"
        )
