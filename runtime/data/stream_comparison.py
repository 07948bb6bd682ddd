"""Check that all ranks, and all loader workers of a rank, read the same stream (``sharded_by: runtime``)."""

from __future__ import annotations

import torch
from torch import Tensor

from runtime.data.stream_pieces import StreamItem

COMPARED = 5
"""Size of :func:`comparison_row`."""

_LENGTHS = "of different lengths"
_CAUSES = (
    "; if it has a private random generator, let it use Python's, NumPy's or torch's global one, which are seeded for each "
    "batch; if it lists files, sort the list, whose order differs between hosts"
)


def readers_differ(pieces: list[StreamItem], expected: str) -> bool:
    """Return whether this rank's readers disagree on the digest of a global batch, or on the ``expected`` one."""
    contents = {piece.content for piece in pieces} | ({expected} if expected else set())
    return len(contents) > 1


def comparison_row(length: float, content: str, differ: bool) -> Tensor:
    """Return (COMPARED,) float64 whose sum over the ranks shows whether they are equal: two numbers, their squares, ``differ``.

    Only 16 bits of the digest are used, so that squares and their sums are exact in float64.
    """
    part = float(int(content[:4] or "0", 16))
    return torch.tensor([length, length**2, part, part**2, float(differ)], dtype=torch.float64)


def difference(table: Tensor, world_size: int, streams: str) -> str:
    """Describe how the data read by ranks and workers differs; empty if it does not.

    The square of a sum of n numbers equals n times the sum of their squares only if all numbers are equal.

    Args:
        table: the last COMPARED columns are sums of :func:`comparison_row` over the ranks.
    """
    sums = table[..., -COMPARED:]
    if bool(sums[..., 4].any()):
        return f"the loader workers of a rank read different {streams}"
    if not torch.equal(sums[..., 0] ** 2, world_size * sums[..., 1]):
        return f"the ranks read {streams} {_LENGTHS}"
    alike = torch.equal(sums[..., 2] ** 2, world_size * sums[..., 3])
    return "" if alike else f"the ranks read {streams} of different contents"


def causes(mismatch: str) -> str:
    """Return the likely causes of a :func:`difference`, as the end of a message."""
    return "" if _LENGTHS in mismatch else _CAUSES
