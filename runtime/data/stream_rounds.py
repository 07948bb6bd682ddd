"""This rank's microbatches of a stream in evaluation, round by round."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from runtime.data.batches import Cursor
from runtime.data.loading import MakeLoader, read
from runtime.data.stream_comparison import causes, comparison_row, difference, readers_differ
from runtime.data.stream_pieces import NOTHING, StreamIndex, StreamItem
from runtime.data.streams import StreamSamples
from runtime.errors import EvaluationError


def evaluation_rounds(
    samples: StreamSamples,
    *,
    world_size: int,
    rank: int,
    make_loader: MakeLoader,
    sum_over_ranks: Callable[[Tensor], Tensor],
) -> Iterator[tuple[int, int, Any] | None]:
    """Yield this rank's microbatch of each round (number, samples, batch), or None if it has none.

    Microbatch m starts at item m times the batch size of the stream, and belongs to rank m % world_size. Collective: every
    rank must iterate.

    Raises:
        EvaluationError: the ranks read different streams.
    """
    expected = ""
    fetched = read(samples, _requests(world_size, rank), make_loader)
    while True:
        first: StreamItem = next(fetched)
        own: StreamItem = first if rank == 0 else next(fetched)
        # The reader of the first microbatch knows what comes next: this rank's own, or the first of the next round.
        differs = (rank == 1 and readers_differ([own], first.next_content)) or (
            world_size == 1 and readers_differ([first], expected)
        )
        expected = first.next_content
        mismatch = difference(
            sum_over_ranks(comparison_row(float(first.total), first.content, differs)), world_size, "evaluation streams"
        )
        if mismatch:
            raise EvaluationError(
                f"{mismatch}, but with sharded_by: runtime each must read all of the same stream: the data set must not divide "
                f"itself{causes(mismatch)}"
            )
        if not first.total:
            return
        yield (own.request.cursor.batch, own.samples, own.batch) if own.samples else None


def _requests(world_size: int, rank: int) -> Iterator[StreamIndex]:
    first = 0
    while True:  # every rank requests a round's first microbatch: it shows whether there is another round
        yield StreamIndex(Cursor(0, first), 0 if rank == 0 else NOTHING, 1, range(1))
        if rank > 0:
            yield StreamIndex(Cursor(0, first + rank), 0, 1, range(1))
        first += world_size
