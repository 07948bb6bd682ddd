"""Requests to the readers of a stream, their replies, and their saved states."""

from __future__ import annotations

import json
from typing import Any, Literal, NamedTuple

from runtime.data.batches import Cursor

ShardedBy = Literal["runtime", "dataset"]

FIRST, NOTHING = -1, -2
"""In place of a slot: the batch's first samples, for fillers; only the counts, no samples."""


class StreamIndex(NamedTuple):
    """A request to a loader worker.

    Args:
        slot: slot number, or FIRST or NOTHING.
        slots: K.
        own: the rank's slots, requested in turn.
        aligning: a dummy request, so that the next one reaches the right worker.
    """

    cursor: Cursor
    slot: int
    slots: int
    own: range
    aligning: bool = False


class StreamItem(NamedTuple):
    """A reader's reply.

    Args:
        request: the request that it answers.
        samples: number of samples in ``batch``.
        batch: collated, or as it was yielded; None if there are no samples.
        total: items of the whole global batch (of this piece if the data set shards).
        more: whether another global batch follows in the epoch; only if the runtime shards.
        worker: number of the reader within the rank.
        state: the data set's ``state_dict`` after the global batch (after this piece if the data set shards).
        content: digest of the global batch that it is part of; equal on all ranks if the runtime shards.
        next_content: digest of what this reader reads next.
        read_again: the stream was read from its beginning, since the data set's state did not restore the position.
    """

    request: StreamIndex
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
    """Position of a reader: the global batch (or the reader's turn) that it reads next.

    Args:
        state: the data set's ``state_dict`` at that position; None if there is none.
        content: digest of what is read next; empty if unknown.
    """

    epoch: int
    number: int
    state: Any
    content: str = ""


class StreamBeginning(NamedTuple):
    """Digests of a stream's first items.

    Args:
        yielded: of the items that the data set yields.
        transformed: of the transformed items.
        collated: of the batches made of those.
        state_fault: why the stream cannot resume from the data set's own state; empty if it can, or if it has none.
    """

    yielded: str
    transformed: str
    collated: str
    state_fault: str


def fits_json(state: Any) -> bool:
    """Return whether a state survives being written to JSON and read back."""
    try:
        return bool(json.loads(json.dumps(state)) == state)
    except (TypeError, ValueError, RecursionError):
        return False
