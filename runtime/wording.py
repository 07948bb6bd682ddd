"""How names and sizes are put to people."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: object, known: Iterable[str], *, within: str = "{}") -> str:
    """Return ``; did you mean 'x'?`` for the nearest of the known names, or nothing.

    Args:
        within: what is shown of it, such as the path that it ends.
    """
    nearest = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.6)
    return f"; did you mean {within.format(nearest[0])!r}?" if nearest else ""


def in_units(num_bytes: float) -> str:
    """Return a number of bytes for people, in units of 1024."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"
