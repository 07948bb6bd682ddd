"""Sums of floats that are rounded once, so that they do not depend on the order of the terms."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence


class ExactSum:
    """The exact sum of finite floats, as non-overlapping parts (Shewchuk 1997, as in :func:`math.fsum`).

    Args:
        parts: of an earlier sum, to be continued.
    """

    def __init__(self, parts: Iterable[float] = ()) -> None:
        self._parts: list[float] = []
        self._not_finite = 0.0  # sum of the terms that are infinite or NaN; it has no order either
        self.add(parts)

    @property
    def parts(self) -> list[float]:
        """Floats whose exact sum it is: the nearest one, the one nearest to the rest, and so on; equal for equal sums."""
        if self._not_finite:
            return [self._not_finite]
        parts, rest = list[float](), list(self._parts)
        while nearest := math.fsum(rest):
            parts.append(nearest)
            rest.append(-nearest)
        return parts

    @property
    def value(self) -> float:
        """The float nearest to the sum; infinite or NaN if a term is, or if the sum exceeds all floats."""
        if self._not_finite:
            return self._not_finite
        try:
            return math.fsum(self._parts)
        except OverflowError:
            return math.copysign(math.inf, self._parts[-1])

    def add(self, terms: Iterable[float]) -> None:
        """Add terms."""
        parts = self._parts
        for term in terms:
            if not math.isfinite(term):
                self._not_finite += term
                continue
            rest, kept = term, 0
            for part in parts:
                larger, smaller = (rest, part) if abs(rest) >= abs(part) else (part, rest)
                rest = larger + smaller
                lost = smaller - (rest - larger)
                if lost:
                    parts[kept] = lost
                    kept += 1
            parts[kept:] = [rest]


def exact_sums(several: Iterable[Mapping[str, Sequence[float]]]) -> dict[str, ExactSum]:
    """Return the sum of each name's terms over all mappings; some may lack names."""
    sums: dict[str, ExactSum] = {}
    for terms in several:
        for name, values in terms.items():
            sums.setdefault(name, ExactSum()).add(values)
    return sums
