"""Rows read a little ahead of their use, so that sums over the ranks are under way before they are needed.

Sums are taken over blocks of rows, since each costs the latency of the network. Reading a whole block at once would let one
step take as long as many, so that throughput jumps, a rank that reads slowly is not where the time goes, and a wish to stop
waits. So rows are read one or two at a time, between the steps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import TypeVar

_Read = TypeVar("_Read")
_Summed = TypeVar("_Summed")

Ahead = int | Callable[[], int]
"""Rows of a block; asked before each block, and equal on all ranks."""

_READS = 2  # for each row that is yielded, until enough are read


def steps_of(ahead: Ahead) -> int:
    """Return the rows of the next block."""
    return ahead() if callable(ahead) else ahead


def summed_ahead(
    rows: Iterator[_Read], begin: Callable[[list[_Read]], Callable[[], list[_Summed]]], ahead: Ahead
) -> Iterator[_Summed]:
    """Yield what a sum over the ranks makes of each row.

    A block's sum is begun as soon as its rows are read, half a block before the first of them is needed; blocks of one row are
    read when they are needed. A block is at most twice as long as the one before. What is begun when follows from the number
    of rows that were yielded, not from where the rows end, so ranks whose rows end at different places meet in the same sums.

    Args:
        begin: begins to sum a block; what it returns waits for the sum. Collective.
        ahead: one and a half times as many rows are held in memory.
    """
    size = steps_of(ahead)
    block: list[_Read] = []
    sums: deque[Callable[[], list[_Summed]]] = deque()
    ready: deque[_Summed] = deque()
    asked = yielded = in_block = 0  # rows asked for, and those of them that belong to the block that is being read
    ended = False
    while True:
        reads = 0
        while not (ready or sums) or (reads < _READS and asked < yielded + size + size // 2):
            if not ended:
                row = next(rows, None)
                ended = row is None
                if row is not None:
                    block.append(row)
            reads, asked, in_block = reads + 1, asked + 1, in_block + 1
            if in_block == size:
                if block:
                    sums.append(begin(block))
                elif ended and not (ready or sums):
                    return
                block, in_block, size = [], 0, min(steps_of(ahead), 2 * size)
        if not ready:
            ready.extend(sums.popleft()())
        yield ready.popleft()
        yielded += 1
