"""Whether all ranks, and all loader workers of a rank, read the same stream where each was to read all of it."""

from __future__ import annotations

import torch
from torch import Tensor

from runtime.data.stream_pieces import StreamItem

SHOWN = 5
"""Numbers in which what the ranks read is compared."""

_LENGTHS = "of different lengths"
_CAUSES = (
    "; if it draws from a generator of its own, let it draw from Python's, NumPy's or torch's, which are seeded for each "
    "batch; if its files are listed, sort the list, which hosts give in different orders"
)


def readers_differ(pieces: list[StreamItem], expected: str) -> bool:
    """Tell whether this rank's readers read different streams: pieces of one global batch, or what is to be its content."""
    contents = {piece.content for piece in pieces} | ({expected} if expected else set())
    return len(contents) > 1


def shown_to_all(length: float, content: str, differ: bool) -> Tensor:
    """Return what shows, summed over the ranks, whether all read the same: two numbers, their squares, and ``differ``.

    Of the digest as many bits as squares and their sums keep exact in float64.
    """
    part = float(int(content[:4] or "0", 16))
    return torch.tensor([length, length**2, part, part**2, float(differ)], dtype=torch.float64)


def difference(together: Tensor, world_size: int, streams: str) -> str:
    """Say how what ranks and workers read differs, given the sums in the last places; empty if it does not.

    The square of a sum of n numbers is n times the sum of their squares only where all are equal.
    """
    sums = together[..., -SHOWN:]
    if bool(sums[..., 4].any()):
        return f"the loader workers of a rank read different {streams}"
    if not torch.equal(sums[..., 0] ** 2, world_size * sums[..., 1]):
        return f"the ranks read {streams} {_LENGTHS}"
    alike = torch.equal(sums[..., 2] ** 2, world_size * sums[..., 3])
    return "" if alike else f"the ranks read {streams} of different contents"


def causes(what: str) -> str:
    """Return what the cause may be, as the end of a message that says how streams differ."""
    return "" if _LENGTHS in what else _CAUSES
