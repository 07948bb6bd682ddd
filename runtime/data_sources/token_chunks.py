"""Split documents of tokens into chunks of inputs and targets; every token is a target once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from runtime.files import rows_within

IGNORED = -100  # default ``ignore_index`` of torch's cross-entropy


@dataclass(frozen=True)
class Chunks:
    """Positions of a data set's chunks in one long array of tokens.

    A document has its first input at its start and its last target at its end. Consecutive chunks of ``context_length``
    inputs share one token, the last target of one and the first input of the next, so that over an epoch every token after
    the start is a target exactly once. No chunk reaches into another document: beyond the document's end, inputs are its
    last token and targets are -100.

    Args:
        starts: (documents,) int64, positions of first inputs.
        ends: (documents,) int64, positions of last targets, above ``starts``.
        context_length: inputs of a chunk.
    """

    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    context_length: int
    _chunk_ends: NDArray[np.int64] = field(init=False, repr=False)
    _first_chunks: NDArray[np.int64] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        counts = -((self.starts - self.ends) // self.context_length)  # rounded up
        # Chunk i belongs to the first document whose chunks end after i.
        object.__setattr__(self, "_chunk_ends", np.cumsum(counts))
        object.__setattr__(self, "_first_chunks", self._chunk_ends - counts)

    def __len__(self) -> int:
        """Return the number of chunks."""
        return int(self._chunk_ends[-1]) if self._chunk_ends.size else 0

    def document_of(self, chunks: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the number of each chunk's document."""
        return np.searchsorted(self._chunk_ends, chunks, side="right")

    def read(self, tokens: NDArray[Any], indices: list[int]) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of chunks, each (len(indices), context_length) int64.

        Raises:
            IndexError: there is no such chunk; negative indices are not supported.
        """
        chunks = rows_within(indices, len(self))
        document = self.document_of(chunks)
        start = self.starts[document] + self.context_length * (chunks - self._first_chunks[document])
        end = self.ends[document][:, np.newaxis]
        positions = start[:, np.newaxis] + np.arange(self.context_length + 1)
        values = tokens[np.minimum(positions, end)].astype(np.int64)
        targets = np.where(positions[:, 1:] <= end, values[:, 1:], IGNORED)
        return torch.from_numpy(values[:, :-1].copy()), torch.from_numpy(targets)
