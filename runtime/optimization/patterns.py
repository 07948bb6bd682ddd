"""Shell patterns of parameter names: ``encoder.*``. A later pattern that begins with ``!`` takes names back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from runtime.wording import did_you_mean

_LISTED = 8


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Tell whether a name is meant; the last pattern that fits it decides."""
    meant = False
    for pattern in patterns:
        if fnmatchcase(name, pattern.removeprefix("!")):
            meant = not pattern.startswith("!")
    return meant


def useless(patterns: Sequence[str], names: Iterable[str]) -> list[str]:
    """Return the patterns that fit none of the names."""
    names = list(names)
    return [p for p in patterns if not any(fnmatchcase(name, p.removeprefix("!")) for name in names)]


def near_miss(pattern: str, names: Iterable[str]) -> str:
    """Return ``; did you mean 'x'?`` for the nearest name, or the nearest ``part.of.a.name.*``, or nothing."""
    known: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        known |= dict.fromkeys([name, *(".".join(parts[:depth]) + ".*" for depth in range(1, len(parts)))])
    return did_you_mean(pattern.removeprefix("!"), known)


def described_misses(patterns: Sequence[str], names: Iterable[str]) -> str:
    """Return the patterns, quoted, each with its near miss, and what the names are."""
    names = list(names)
    misses = ", ".join(f"{pattern!r}{near_miss(pattern, names)}" for pattern in patterns)
    more = f", … ({len(names)} in all)" if len(names) > _LISTED else ""
    return f"{misses} (the names are {', '.join(names[:_LISTED])}{more})" if names else misses
