"""What the reader of a stream is asked for, what it gives back, and where it stands."""

from __future__ import annotations

import json
from typing import Any, Literal, NamedTuple

from runtime.data.batches import Cursor

ShardedBy = Literal["runtime", "dataset"]

FIRST, NOTHING = -1, -2
"""In place of a slot: the batch's first samples, for fillers; nothing but the counts."""


class StreamIndex(NamedTuple):
    """What a loader's worker is asked for.

    Args:
        slot: its number, or FIRST or NOTHING.
        slots: K.
        own: the rank's slots; they are asked for in turn.
        aligning: asked only so that the next question reaches the worker that it belongs to.
    """

    cursor: Cursor
    slot: int
    slots: int
    own: range
    aligning: bool = False


class StreamItem(NamedTuple):
    """What comes back.

    Args:
        asked: what was asked for.
        samples: in ``batch``.
        batch: collated, or as it was yielded; None if there are no samples.
        total: items of the whole global batch, where the runtime shards; else of the piece.
        more: whether another global batch follows in the epoch, where the runtime shards.
        worker: which reader of the rank it was.
        state: the data set's own state behind the global batch (behind the piece, where the data set shards).
        content: digest of the global batch that it is part of; equal on all ranks where the runtime shards.
        next_content: digest of what this reader reads next.
        read_again: the data set's own state did not lead to where a run stopped, so the reader came from the beginning.
    """

    asked: StreamIndex
    samples: int = 0
    batch: Any = None
    total: int = 0
    more: bool = False
    worker: int = 0
    state: Any = None
    content: str = ""
    next_content: str = ""
    read_again: bool = False


class ReaderState(NamedTuple):
    """Where a reader stands: the global batch (or the reader's turn) that it reads next.

    Args:
        state: of the data set's own, before that; None if there is none.
        content: digest of what is read there; empty if it is not known.
    """

    epoch: int
    number: int
    state: Any
    content: str = ""


class StreamBeginning(NamedTuple):
    """Digests of a stream's first items.

    Args:
        given: of what the data set gives.
        transformed: of what the transform makes of it.
        collated: of the batches that are made of that.
        state_lacks: why the stream cannot go on from the data set's own state; empty if it can, or if it has none.
    """

    given: str
    transformed: str
    collated: str
    state_lacks: str


def fits_json(state: Any) -> bool:
    """Tell whether a state can be written to a checkpoint and read back as it was."""
    try:
        return bool(json.loads(json.dumps(state)) == state)
    except (TypeError, ValueError, RecursionError):
        return False
