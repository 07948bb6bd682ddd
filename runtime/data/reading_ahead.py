"""Read rows a little ahead of their use, so that sums over the ranks are in progress before they are needed.

Each sum covers a block of rows, since each costs the latency of the network. Reading a whole block at once would make one
step take as long as many: throughput would jump, a slow reader would be timed at the wrong step, and stop requests would
wait. So rows are read one or two at a time, between the steps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import TypeVar

_Read = TypeVar("_Read")
_Summed = TypeVar("_Summed")

Ahead = int | Callable[[], int]
"""Rows of a block, or a function called before each block; equal on all ranks."""

_READS = 2  # per yielded row, until enough are read


def steps_of(ahead: Ahead) -> int:
    """Return the rows of the next block."""
    return ahead() if callable(ahead) else ahead


def summed_ahead(
    rows: Iterator[_Read], begin: Callable[[list[_Read]], Callable[[], list[_Summed]]], ahead: Ahead
) -> Iterator[_Summed]:
    """Yield each row's result of a sum over the ranks.

    A block's sum starts as soon as its rows are read, half a block before the first of them is needed; blocks of one row are
    read when they are needed. A block is at most twice as long as the one before. The number of rows yielded, not the end
    of the rows, determines when sums start, so ranks whose rows end at different points take part in the same sums.

    Args:
        begin: starts summing a block; the returned function waits for the sum. Collective.
        ahead: rows of a block; 1.5 times this number of rows is held in memory.
    """
    size = steps_of(ahead)
    block: list[_Read] = []
    sums: deque[Callable[[], list[_Summed]]] = deque()
    ready: deque[_Summed] = deque()
    requested = yielded = in_block = 0  # in_block: those of the requested rows that belong to the current block
    ended = False
    while True:
        reads = 0
        while not (ready or sums) or (reads < _READS and requested < yielded + size + size // 2):
            if not ended:
                row = next(rows, None)
                ended = row is None
                if row is not None:
                    block.append(row)
            reads, requested, in_block = reads + 1, requested + 1, in_block + 1
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
