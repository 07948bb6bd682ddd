"""This rank's microbatches of a stream in evaluation, round by round."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from runtime.data.batches import Cursor
from runtime.data.loading import MakeLoader, read
from runtime.data.stream_comparison import causes, difference, readers_differ, shown_to_all
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
    """Yield this rank's microbatch of each round (number, samples, batch), or None where it has none.

    Microbatch m is what the stream gives from m times its batch size on, and belongs to rank m % world_size. Collective:
    every rank must iterate.

    Raises:
        EvaluationError: the ranks read different streams.
    """
    expected = ""
    fetched = read(samples, _questions(world_size, rank), make_loader)
    while True:
        first: StreamItem = next(fetched)
        own: StreamItem = first if rank == 0 else next(fetched)
        # The reader of the first microbatch knows what comes next: this rank's own, or the first of the next round.
        differs = (rank == 1 and readers_differ([own], first.next_content)) or (
            world_size == 1 and readers_differ([first], expected)
        )
        expected = first.next_content
        what = difference(
            sum_over_ranks(shown_to_all(float(first.total), first.content, differs)), world_size, "evaluation streams"
        )
        if what:
            raise EvaluationError(
                f"{what}, though each was to read all of one (sharded_by: runtime): the data set must not share "
                f"itself out{causes(what)}"
            )
        if not first.total:
            return
        yield (own.asked.cursor.batch, own.samples, own.batch) if own.samples else None


def _questions(world_size: int, rank: int) -> Iterator[StreamIndex]:
    place = 0
    while True:  # whether there is another round shows in its first microbatch
        yield StreamIndex(Cursor(0, place), 0 if rank == 0 else NOTHING, 1, range(1))
        if rank > 0:
            yield StreamIndex(Cursor(0, place + rank), 0, 1, range(1))
        place += world_size
