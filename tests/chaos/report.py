"""What happened, as a table."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from tests.chaos.attacks import KINDS


@dataclass
class Row:
    """What the table says of one kind."""

    attacks: int = 0
    worlds: Counter[str] = field(default_factory=Counter)
    bitwise: int = 0
    close: int = 0
    failed: int = 0
    worst: float = 0.0
    aside: int = 0
    seconds: float = 0.0


def table(found: dict[str, Row]) -> str:
    """Return what happened, in Markdown."""
    lines = [
        "| attack | kind | struck | processes before→after | bitwise equal | equal to 1e-10 | failed | worst difference "
        "| moved aside | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    rows = {**{KINDS[kind][0]: (kind, row) for kind, row in found.items() if row.worlds}}
    for text, (kind, row) in rows.items():
        worlds = " ".join(f"{pair}×{count}" if count > 1 else pair for pair, count in sorted(row.worlds.items()))
        lines.append(
            f"| {text} | `{kind}` | {row.attacks} | {worlds} | {row.bitwise} | {row.close} | {row.failed} "
            f"| {row.worst:.1e} | {row.aside} | {row.seconds:.1f} |"
        )
    return "\n".join(lines)
