"""Fills in a sample submission: its ids in its order, its columns, every value from the predictions.

Predictions arrive in the data set's order and are written in the sample's. In between they are kept in a temporary, unnamed
SQLite database, which spills to disk: memory stays bounded, and a killed process leaves no file.
"""

from __future__ import annotations

import csv
import json
import sqlite3
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from runtime.errors import PredictionError
from runtime.inference.columns import Columns
from runtime.inference.predictions_file import csv_lines, split_names, texts, with_names

_SHOWN = 5
_ROWS = 10_000  # read or written at a time


class SubmissionFile:
    """Like :class:`runtime.inference.predictions_file.CsvFile`, but with the rows and columns of a sample submission.

    Args:
        file: opened for writing.
        sample: the sample submission.
        id_column: the sample's column that holds the ids.
        num_samples: number of samples in the data set.
        ids_are_index: whether the samples' ids are their positions in the data set, and so known in advance.
        labels: the configuration's class labels; these are written whatever the sample's columns hold. Any other text is
            refused in a column of numbers, and any other number in a column of text.

    Raises:
        PredictionError: the sample cannot be read, or has a duplicate id.
    """

    def __init__(
        self,
        file: BinaryIO,
        sample: Path,
        id_column: str,
        *,
        num_samples: int,
        ids_are_index: bool,
        labels: Sequence[str | int] = (),
    ) -> None:
        self._file = file
        self._sample = sample
        self._header = header_of(sample)
        self._id_position = self._header.index(id_column)
        self._labels = {str(label) for label in labels}
        self._examples = {n: _ColumnExamples() for n in range(len(self._header)) if n != self._id_position}
        self._rows = sqlite3.connect("", isolation_level=None)
        self._rows.execute("CREATE TABLE rows (place INTEGER PRIMARY KEY, id TEXT, line TEXT)")
        self._read_ids()
        self._refuse_too_many(num_samples, ids_are_index=ids_are_index)

    @staticmethod
    def encode(columns: Columns) -> bytes:
        """Return the names and the rows, all values as strings."""
        listed = [["" if value is None else str(value) for value in texts(values)] for values in columns.values()]
        return with_names(columns, json.dumps(list(zip(*listed, strict=True))).encode())

    def append(self, payload: bytes) -> None:
        """Store rows.

        Raises:
            PredictionError: a column is missing or extra, or an id is a duplicate or not in the sample.
        """
        names, body = split_names(payload)
        self._check_columns(names)
        order = [names.index(name) for name in self._header]
        unknown: list[str] = []
        duplicates: list[str] = []
        self._rows.execute("BEGIN")
        for row in json.loads(body):
            values = [row[position] for position in order]
            id_ = values[self._id_position]
            self._check_kind(values)
            (line,) = csv_lines([values])
            updated = self._rows.execute("UPDATE rows SET line = ? WHERE id = ? AND line IS NULL", (line, id_))
            if updated.rowcount == 0:
                (duplicates if self._has_id(id_) else unknown).append(id_)
        self._rows.execute("COMMIT")
        if unknown:
            raise PredictionError(
                f"{self._sample} does not have every predicted id: {_few(unknown)} are extra; its first is "
                f"{self._first()!r}. Check data.fields.id and prediction.data. Nothing was written"
            )
        if duplicates:
            raise PredictionError(f"the predicted data has duplicate ids: {_few(duplicates)}. Nothing was written")

    def finish(self) -> None:
        """Write everything in the sample's order.

        Raises:
            PredictionError: the predictions lack ids of the sample.
        """
        (missing,) = self._rows.execute("SELECT COUNT(*) FROM rows WHERE line IS NULL").fetchone()
        if missing:
            query = "SELECT id FROM rows WHERE line IS NULL ORDER BY place LIMIT ?"
            first = [id_ for (id_,) in self._rows.execute(query, (_SHOWN,))]
            raise PredictionError(
                f"{missing:,} ids of {self._sample} are missing from the predictions: {_few(first, missing)}. Nothing was "
                "written"
            )
        self._file.write("".join(csv_lines([self._header])).encode())
        lines = self._rows.execute("SELECT line FROM rows ORDER BY place")
        while chunk := lines.fetchmany(_ROWS):
            self._file.write("".join(line for (line,) in chunk).encode())

    def close(self) -> None:
        """Close the database and free its space."""
        self._rows.close()

    def _read_ids(self) -> None:
        ids = self._ids()
        while chunk := [(id_,) for _, id_ in zip(range(_ROWS), ids, strict=False)]:
            self._rows.execute("BEGIN")
            self._rows.executemany("INSERT INTO rows (id) VALUES (?)", chunk)
            self._rows.execute("COMMIT")
        if self._first() is None:
            raise PredictionError(f"{self._sample} has no rows")
        self._rows.execute("CREATE INDEX by_id ON rows (id)")
        query = "SELECT id FROM rows GROUP BY id HAVING COUNT(*) > 1 ORDER BY MIN(place) LIMIT ?"
        duplicates = [id_ for (id_,) in self._rows.execute(query, (_SHOWN + 1,))]
        if duplicates:
            raise PredictionError(f"{self._sample} has duplicate ids: {_few(duplicates)}")

    def _refuse_too_many(self, num_samples: int, *, ids_are_index: bool) -> None:
        """Raise before prediction if ids will be missing: at the end hours may have been spent."""
        (count,) = self._rows.execute("SELECT COUNT(*) FROM rows").fetchone()
        if count <= num_samples:
            return
        examples = ""
        if ids_are_index:
            ids = (id_ for (id_,) in self._rows.execute("SELECT id FROM rows ORDER BY place"))
            unknown = (i for i in ids if not (i.isdigit() and int(i) < num_samples and i == str(int(i))))
            examples = f" ({_few(list(islice(unknown, _SHOWN)), count - num_samples)})"
        raise PredictionError(
            f"{self._sample} has {count:,} ids and the data {num_samples:,} samples: at least {count - num_samples:,} ids "
            f"would be missing from the predictions{examples}. Nothing was written"
        )

    def _ids(self) -> Iterator[str]:
        for number, row in _read(self._sample):
            if number > 1:
                if len(row) != len(self._header):
                    raise PredictionError(
                        f"{self._sample}:{number} has {len(row)} values, its header {len(self._header)} columns"
                    )
                for position, examples in self._examples.items():
                    examples.add(row[position])
                yield row[self._id_position]

    def _check_columns(self, names: Sequence[str]) -> None:
        if set(names) == set(self._header):
            return
        missing = [name for name in self._header if name not in names]
        extra = [name for name in names if name not in self._header]
        differing = [f"no column {_few(missing)}"] if missing else []
        differing += [f"extra columns {_few(extra)}"] if extra else []
        raise PredictionError(
            f"the columns of {self._sample} are {', '.join(self._header)}; the predictions have {' and '.join(differing)}: "
            "set in prediction.columns what each holds. Nothing was written"
        )

    def _check_kind(self, values: Sequence[str]) -> None:
        """Refuse numbers where the sample has text, and the reverse: scoring would compare class names with class indices."""
        for position, examples in self._examples.items():
            value, name = values[position], self._header[position]
            if not value or value in self._labels:
                continue
            if examples.all_text and _is_number(value):
                raise PredictionError(
                    f"column {name!r} of {self._sample} holds text, such as {examples.text!r}, but the predictions are "
                    f"numbers, such as {value}: set the names of the classes in prediction.labels. Nothing was written"
                )
            if examples.all_numbers and not _is_number(value):
                raise PredictionError(
                    f"column {name!r} of {self._sample} holds numbers, such as {examples.number}, but the predictions are "
                    f"text, such as {value!r}: set in prediction.labels what to write for each class. Nothing was written"
                )

    def _has_id(self, id_: str) -> bool:
        return self._rows.execute("SELECT 1 FROM rows WHERE id = ? LIMIT 1", (id_,)).fetchone() is not None

    def _first(self) -> str | None:
        row = self._rows.execute("SELECT id FROM rows ORDER BY place LIMIT 1").fetchone()
        return None if row is None else str(row[0])


class _ColumnExamples:
    """The first text and the first number in a column of a sample, if any."""

    def __init__(self) -> None:
        self.text = self.number = ""

    def add(self, value: str) -> None:
        if _is_number(value):
            self.number = self.number or value
        elif any(letter.isalpha() for letter in value):  # "?" and "-" are placeholders
            self.text = self.text or value

    @property
    def all_text(self) -> bool:
        return bool(self.text) and not self.number

    @property
    def all_numbers(self) -> bool:
        return bool(self.number) and not self.text


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


def header_of(sample: Path) -> list[str]:
    """Return a sample submission's columns.

    Raises:
        PredictionError: the file cannot be read, or has a duplicate column.
    """
    _, header = next(_read(sample), (0, []))
    if not header:
        raise PredictionError(f"{sample} is empty; a sample submission has a header and a row for each id")
    if len(set(header)) < len(header):
        raise PredictionError(f"{sample} has a duplicate column: {', '.join(header)}")
    return header


def _read(sample: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield line numbers and rows, without blank lines."""
    try:
        with sample.open(newline="", encoding="utf-8-sig") as file:
            reader: Any = csv.reader(file, strict=True)
            for row in reader:
                if row:
                    yield reader.line_num, row
    except OSError as error:
        raise PredictionError(f"{sample} cannot be read: {error.strerror or error}") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise PredictionError(f"{sample} is not a CSV file in UTF-8: {error}") from error


def _few(ids: Sequence[str], count: int | None = None) -> str:
    shown = ", ".join(repr(id_) for id_ in ids[:_SHOWN])
    return f"{shown}, …" if (count or len(ids)) > _SHOWN else shown
