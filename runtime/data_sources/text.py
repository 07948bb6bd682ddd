"""Texts: the lines of a file, or texts with labels from a CSV or Parquet file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from runtime.data_sources.tables import Table
from runtime.errors import DataError
from runtime.files import digest, existing, rows_within

Tokenizer = Callable[[list[str]], Mapping[str, Any]]


class Texts(Dataset[dict[str, Any]]):
    """Texts, tokenised a whole microbatch at a time, or a sample at a time for a collate function that pads."""

    deterministic = True
    shared_arguments: tuple[str, ...] = ("tokenizer", "tokenize")
    """Arguments that data to predict takes over from the training data."""

    def __init__(
        self, texts: Sequence[str], tokenizer: Tokenizer | str | None, options: Mapping[str, Any] | None
    ) -> None:
        if not (tokenizer in (None, "bytes") or callable(tokenizer)):
            raise DataError(
                f"tokenizer {tokenizer!r} is unknown: use 'bytes', or a component that can be called with texts"
            )
        if options and not callable(tokenizer):
            raise DataError("'tokenize' holds arguments of a tokenizer component; set 'tokenizer' to one")
        self._texts = texts
        self._tokenizer = tokenizer
        self._options = dict(options or {})

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one sample."""
        return self._samples([index])[0]

    def __getitems__(self, indices: list[int]) -> Any:
        """Return a finished batch if the tokenizer returns tensors, else a list of samples."""
        if not callable(self._tokenizer):
            return self._samples(indices)
        rows = rows_within(indices, len(self))
        tokens = dict(self._tokenizer([self._texts[i] for i in rows.tolist()], **self._options))
        if not all(isinstance(part, torch.Tensor) for part in tokens.values()):
            return [
                {**{name: part[place] for name, part in tokens.items()}, **self._labels([row])[0]}
                for place, row in enumerate(rows.tolist())
            ]
        labels = self._labels(rows.tolist())
        parts = {name: torch.tensor([label[name] for label in labels]) for name in labels[0]} if labels else {}
        return {**tokens, **parts}

    def column(self, name: str) -> NDArray[Any]:
        """Return the ``length`` of every text, in characters."""
        if name != "length":
            raise DataError(f"there is no column {name!r}; there is 'length'")
        return np.array([len(text) for text in self._texts], dtype=np.int64)

    def _samples(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        rows = rows_within(indices, len(self)).tolist()
        texts = [self._texts[i] for i in rows]
        if callable(self._tokenizer):
            tokens = [
                {name: part[0] for name, part in self._tokenizer([text], **self._options).items()} for text in texts
            ]
        elif self._tokenizer == "bytes":
            tokens = [{"inputs": torch.tensor(list(text.encode()), dtype=torch.int64)} for text in texts]
        else:
            tokens = [{"inputs": text} for text in texts]
        return [{**sample, **label} for sample, label in zip(tokens, self._labels(rows), strict=True)]

    def _labels(self, rows: list[int]) -> list[dict[str, Any]]:
        return [{} for _ in rows]


class TextLines(Texts):
    """The non-empty lines of a text file.

    Args:
        path: the file, read into memory.
        tokenizer: ``bytes``: a sample is ``{inputs: (bytes,) int64}``, of varying length, for
            ``data.collate: {target: Padded}``. A component, such as ``{target: "transformers:AutoTokenizer.from_pretrained",
            args: {…}}``, is called with a list of texts. Default: ``{inputs: the text}``.
        tokenize: arguments of that call, such as ``{padding: true, truncation: true, return_tensors: pt}``.
        encoding: of the file.
        provided_by: command that installs the file, for the error message if it is missing.

    Raises:
        DataError: the file is missing or has another encoding.
    """

    shared_arguments = (*Texts.shared_arguments, "encoding")

    def __init__(
        self,
        path: str,
        *,
        tokenizer: Tokenizer | str | None = None,
        tokenize: Mapping[str, Any] | None = None,
        encoding: str = "utf-8",
        provided_by: str | None = None,
    ) -> None:
        file = existing(path, provided_by=provided_by)
        try:
            content = file.read_bytes().decode(encoding)
        except (UnicodeDecodeError, LookupError) as error:
            raise DataError(f"{file} cannot be read as {encoding}: {error}") from error
        # Not str.splitlines, which also splits at form feeds and other separators.
        lines = [line.removesuffix("\r") for line in content.split("\n")]
        super().__init__([line for line in lines if line], tokenizer, tokenize)
        self.fingerprint = f"lines {digest(file)} {encoding}"


class LabelledTexts(Texts):
    """Texts with one class each, from two columns of a CSV or Parquet file.

    Args:
        path: the file, read into memory.
        text: column of texts.
        target: column of classes, numbered in the sorted order of the training rows' values. Default: none.
        tokenizer: see :class:`TextLines`; the class is the part ``target``, an int64 scalar.
        tokenize: arguments of the tokenizer's call.
        delimiter: between two values of a CSV file. Default: a comma.
        encoding: of a CSV file. Default: UTF-8.
        provided_by: command that installs the file, for the error message if it is missing.

    Raises:
        DataError: the file, a column or a class is missing.
    """

    shared_arguments = (*Texts.shared_arguments, "text", "delimiter", "encoding")

    def __init__(
        self,
        path: str,
        *,
        text: str,
        target: str | None = None,
        tokenizer: Tokenizer | str | None = None,
        tokenize: Mapping[str, Any] | None = None,
        delimiter: str | None = None,
        encoding: str | None = None,
        provided_by: str | None = None,
    ) -> None:
        self._table = Table(
            path,
            target=target,
            task="classification" if target is not None else None,
            numeric=(),
            keep=[text],
            missing_values=("",),
            delimiter=delimiter,
            encoding=encoding,
            provided_by=provided_by,
        )
        self._has_target = target is not None
        super().__init__(self._table.column(text).tolist(), tokenizer, tokenize)

    @property
    def fingerprint(self) -> str:
        """Digests of the file and of the classes."""
        return f"texts {self._table.fingerprint}"

    @property
    def fitted(self) -> dict[str, Any]:
        """The classes of the training rows."""
        return self._table.fitted

    def fit(self, rows: NDArray[np.int64]) -> None:
        """Number the classes found in these rows."""
        self._table.fit(rows)

    def adopt(self, fitted: Mapping[str, Any]) -> None:
        """Number the classes as another split does."""
        self._table.adopt(fitted)

    @property
    def classes(self) -> list[str]:
        """Class names, in the order of their numbers."""
        return self._table.classes

    def column(self, name: str) -> NDArray[Any]:
        """Return the ``length`` of every text in characters, or a column of the file."""
        return super().column(name) if name == "length" else self._table.column(name)

    def as_written(self, name: str) -> NDArray[Any]:
        """Return a column as written in the file."""
        return self._table.as_written(name)

    def _labels(self, rows: list[int]) -> list[dict[str, Any]]:
        if not self._has_target:
            return super()._labels(rows)
        return [{"target": label} for label in self._table.targets(np.array(rows, dtype=np.int64)).tolist()]
