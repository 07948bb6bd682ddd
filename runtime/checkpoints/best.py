"""Ranking of results: those of the checkpoints on disk, and that of a new evaluation.

An evaluation among the best triggers a save at its step, whatever the intervals. So the best checkpoints are the best of all
evaluations, and interruptions, which may cause other saves, do not change which they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from runtime.config.sections import BestSection

_T = TypeVar("_T")


def ranked(candidates: Iterable[_T], best: BestSection, results: Callable[[_T], Mapping[str, Any]]) -> list[_T]:
    """Return the best candidates, best first; of two equal ones the earlier. Only finite numbers count.

    Args:
        results: returns a candidate's results.
    """

    def value(candidate: _T) -> float:
        found = results(candidate).get(best.metric, math.nan)
        return found if isinstance(found, int | float) else math.nan

    judged = [candidate for candidate in candidates if math.isfinite(value(candidate))]
    return sorted(judged, key=value, reverse=best.mode == "max")[: best.keep]


class BestResults:
    """The best saved results; equal on every rank.

    Args:
        sections: the ranked metrics.
        saved: the results of all existing checkpoints, oldest first.
    """

    def __init__(self, sections: Sequence[BestSection], saved: Iterable[Mapping[str, Any]]) -> None:
        self._sections = sections
        known = list(saved)
        self._best = [ranked(known, best, _identity) for best in sections]

    def improved_by(self, results: Mapping[str, Any]) -> bool:
        """Whether an evaluation's results are among the best of any metric."""
        return self._with(results) != self._best

    def add(self, results: Mapping[str, Any]) -> None:
        """Record results that were saved."""
        self._best = self._with(results)

    def _with(self, results: Mapping[str, Any]) -> list[list[Mapping[str, Any]]]:
        return [
            ranked([*known, results], best, _identity) for known, best in zip(self._best, self._sections, strict=True)
        ]


def _identity(results: Mapping[str, Any]) -> Mapping[str, Any]:
    return results
