"""Language model tokens in one memory-mapped binary file."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from runtime.data_sources.token_chunks import Chunks
from runtime.errors import DataError
from runtime.files import digest, existing

_SCANNED = 1 << 22  # tokens searched for document ends at once


class TokenFile(Dataset[dict[str, Tensor]]):
    """Next-token prediction over a file of consecutive token numbers (``array.astype('<u2').tofile(path)``).

    With ``end_of_document`` no sample crosses the end of a document: its last sample is padded with that token, and the
    padding's targets are -100 (``ignore_index``). Every token but the file's first is a target once per epoch.

    Args:
        path: the file; only the pages that are read are ever in memory.
        context_length: inputs of a sample.
        dtype: ``uint16`` or ``uint32``, little-endian.
        end_of_document: token that ends each document. Default: the file is one document.
        skip_bytes: length of a header to skip.
        provided_by: command that installs the file, for the error message if it is missing.

    A sample is ``{inputs, target}``, each (context_length,) int64. For splitting by document, ``column("document")``
    numbers the documents: ``data.split.group: document``.

    Raises:
        DataError: the file is missing, or does not hold a whole number of at least two tokens.
    """

    deterministic = True

    def __init__(
        self,
        path: str,
        *,
        context_length: int,
        dtype: str = "uint16",
        end_of_document: int | None = None,
        skip_bytes: int = 0,
        provided_by: str | None = None,
    ) -> None:
        if dtype not in ("uint16", "uint32"):
            raise DataError(f"dtype {dtype!r} is unknown: use 'uint16' or 'uint32'")
        if context_length < 1:
            raise DataError(f"context_length={context_length}: it must be at least 1")
        self._path = existing(path, provided_by=provided_by)
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._skip_bytes = skip_bytes
        rest = self._path.stat().st_size - skip_bytes
        if rest % self._dtype.itemsize or rest < 2 * self._dtype.itemsize:
            raise DataError(
                f"{self._path} has {rest} bytes{f' after the first {skip_bytes}' * (skip_bytes > 0)}, which is not a whole "
                f"number of at least two {dtype} tokens; check 'dtype' and 'skip_bytes'"
            )
        self._tokens = self._open()
        bounds = _bounds(self._tokens, end_of_document)
        self.context_length = context_length
        self._chunks = Chunks(bounds[:-1], bounds[1:], context_length)
        self.fingerprint = (
            f"tokens {digest(self._path)} {dtype} context_length={context_length} end_of_document={end_of_document} "
            f"skip_bytes={skip_bytes}"
        )

    def __len__(self) -> int:
        return len(self._chunks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return inputs and targets of one chunk, each (context_length,) int64."""
        return {name: part[0] for name, part in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """Return a finished batch: inputs and targets, each (len(indices), context_length) int64."""
        inputs, target = self._chunks.read(self._tokens, indices)
        return {"inputs": inputs, "target": target}

    def column(self, name: str) -> NDArray[Any]:
        """Return the number of each sample's ``document``."""
        if name != "document":
            raise DataError(f"there is no column {name!r}; there is 'document'")
        return self._chunks.document_of(np.arange(len(self), dtype=np.int64))

    def __getstate__(self) -> dict[str, Any]:
        """Omit the tokens: a loader worker maps the file again."""
        return {name: value for name, value in self.__dict__.items() if name != "_tokens"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore everything else and map the file."""
        self.__dict__.update(state)
        self._tokens = self._open()

    def _open(self) -> NDArray[Any]:
        # As a plain array over the map: indexing the memmap subclass is slower. The map closes with it.
        return np.asarray(np.memmap(self._path, dtype=self._dtype, mode="r", offset=self._skip_bytes))


def _bounds(tokens: NDArray[Any], end_of_document: int | None) -> NDArray[np.int64]:
    """Return the document boundaries: positions of each one's last target, which is the next one's first input."""
    last = len(tokens) - 1
    if end_of_document is None:
        return np.array([0, last], dtype=np.int64)
    ends = [
        start + np.flatnonzero(tokens[start : start + _SCANNED] == end_of_document)
        for start in range(0, len(tokens), _SCANNED)
    ]
    return np.unique(np.concatenate([[0], *ends, [last]])).astype(np.int64)
