"""Shell patterns of parameter names: ``encoder.*``. A later pattern that begins with ``!`` excludes names again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from runtime.wording import did_you_mean

_LISTED = 8


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Return whether patterns select a name; the last one that matches it decides."""
    selected = False
    for pattern in patterns:
        if fnmatchcase(name, pattern.removeprefix("!")):
            selected = not pattern.startswith("!")
    return selected


def unmatched(patterns: Sequence[str], names: Iterable[str]) -> list[str]:
    """Return the patterns that match none of the names."""
    names = list(names)
    return [p for p in patterns if not any(fnmatchcase(name, p.removeprefix("!")) for name in names)]


def near_miss(pattern: str, names: Iterable[str]) -> str:
    """Return ``; did you mean 'x'?`` with the nearest name or ``prefix.of.a.name.*``, or an empty string."""
    known: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        known |= dict.fromkeys([name, *(".".join(parts[:depth]) + ".*" for depth in range(1, len(parts)))])
    return did_you_mean(pattern.removeprefix("!"), known)


def described_misses(patterns: Sequence[str], names: Iterable[str]) -> str:
    """Return the quoted patterns, each with its near miss, and a list of the names."""
    names = list(names)
    misses = ", ".join(f"{pattern!r}{near_miss(pattern, names)}" for pattern in patterns)
    more = f", … ({len(names)} in all)" if len(names) > _LISTED else ""
    return f"{misses} (the names are {', '.join(names[:_LISTED])}{more})" if names else misses
