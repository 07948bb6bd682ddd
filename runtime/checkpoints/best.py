"""Which results are the best: of the checkpoints on disk, and of an evaluation that has just been made.

An evaluation that is among the best makes a save due at its step, whatever the intervals. So the best checkpoints are the
best of all evaluations, and no interruption, after which there may be other saves, has a say in which they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from runtime.config.sections import BestSection

_T = TypeVar("_T")


def ranked(candidates: Iterable[_T], best: BestSection, results: Callable[[_T], Mapping[str, Any]]) -> list[_T]:
    """Return the best candidates, best first, the earlier one of two that are equal; only finite numbers are judged.

    Args:
        results: of a candidate.
    """

    def value(candidate: _T) -> float:
        found = results(candidate).get(best.metric, math.nan)
        return found if isinstance(found, int | float) else math.nan

    judged = [candidate for candidate in candidates if math.isfinite(value(candidate))]
    return sorted(judged, key=value, reverse=best.mode == "max")[: best.keep]


class BestResults:
    """The best results that are saved, as every rank knows them.

    Args:
        wanted: which results are judged.
        saved: the results of all checkpoints that there are, oldest first.
    """

    def __init__(self, wanted: Sequence[BestSection], saved: Iterable[Mapping[str, Any]]) -> None:
        self._wanted = wanted
        known = list(saved)
        self._best = [ranked(known, best, _themselves) for best in wanted]

    def improved_by(self, results: Mapping[str, Any]) -> bool:
        """Tell whether an evaluation's results are to be among the best of any metric."""
        return self._with(results) != self._best

    def add(self, results: Mapping[str, Any]) -> None:
        """Take note of results that are saved."""
        self._best = self._with(results)

    def _with(self, results: Mapping[str, Any]) -> list[list[Mapping[str, Any]]]:
        return [
            ranked([*known, results], best, _themselves) for known, best in zip(self._best, self._wanted, strict=True)
        ]


def _themselves(results: Mapping[str, Any]) -> Mapping[str, Any]:
    return results
