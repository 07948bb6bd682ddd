"""A sample submission filled in: its ids in its order, its columns, every value from the predictions.

Ids come in the data set's order and leave in the sample's. What lies between is in a temporary SQLite database, which spills
to disk and has no name there: memory stays bounded, and a kill leaves nothing.
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
    """Like :class:`runtime.inference.predictions_file.CsvFile`, but in the rows and columns of a sample.

    Args:
        file: what is written to.
        sample: the sample submission.
        id_column: which of its columns holds the ids.
        num_samples: in the data set.
        ids_are_index: whether samples are called by their place in the data set, so that ids are known beforehand.
        labels: what the configuration calls the classes; these are written whatever the sample's columns hold. Anything else
            is no text where the sample has numbers, and no number where it has texts.

    Raises:
        PredictionError: the sample cannot be read, or has an id twice.
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
        self._place = self._header.index(id_column)
        self._labels = {str(label) for label in labels}
        self._seen = {place: _Seen() for place in range(len(self._header)) if place != self._place}
        self._rows = sqlite3.connect("", isolation_level=None)
        self._rows.execute("CREATE TABLE rows (place INTEGER PRIMARY KEY, id TEXT, line TEXT)")
        self._read_ids()
        self._refuse_too_many(num_samples, ids_are_index=ids_are_index)

    @staticmethod
    def encode(columns: Columns) -> bytes:
        """Return the names and the rows as texts."""
        listed = [["" if value is None else str(value) for value in texts(values)] for values in columns.values()]
        return with_names(columns, json.dumps(list(zip(*listed, strict=True))).encode())

    def append(self, payload: bytes) -> None:
        """Take in rows.

        Raises:
            PredictionError: a column is missing or too many, or an id is not in the sample or comes twice.
        """
        names, body = split_names(payload)
        self._check_columns(names)
        order = [names.index(name) for name in self._header]
        strange: list[str] = []
        twice: list[str] = []
        self._rows.execute("BEGIN")
        for row in json.loads(body):
            values = [row[place] for place in order]
            called = values[self._place]
            self._check_kind(values)
            (line,) = csv_lines([values])
            found = self._rows.execute("UPDATE rows SET line = ? WHERE id = ? AND line IS NULL", (line, called))
            if found.rowcount == 0:
                (twice if self._knows(called) else strange).append(called)
        self._rows.execute("COMMIT")
        if strange:
            raise PredictionError(
                f"{self._sample} does not have every id that is predicted: {_few(strange)} are extra; its first is "
                f"{self._first()!r}. Check data.fields.id and prediction.data. Nothing was written"
            )
        if twice:
            raise PredictionError(f"the predicted data has ids more than once: {_few(twice)}. Nothing was written")

    def finish(self) -> None:
        """Write everything in the sample's order.

        Raises:
            PredictionError: ids of the sample are missing among the predictions.
        """
        (missing,) = self._rows.execute("SELECT COUNT(*) FROM rows WHERE line IS NULL").fetchone()
        if missing:
            query = "SELECT id FROM rows WHERE line IS NULL ORDER BY place LIMIT ?"
            first = [called for (called,) in self._rows.execute(query, (_SHOWN,))]
            raise PredictionError(
                f"{missing:,} ids of {self._sample} are missing among the predictions: {_few(first, missing)}. Nothing was "
                "written"
            )
        self._file.write("".join(csv_lines([self._header])).encode())
        lines = self._rows.execute("SELECT line FROM rows ORDER BY place")
        while chunk := lines.fetchmany(_ROWS):
            self._file.write("".join(line for (line,) in chunk).encode())

    def close(self) -> None:
        """Give the database's space back."""
        self._rows.close()

    def _read_ids(self) -> None:
        ids = self._ids()
        while chunk := [(called,) for _, called in zip(range(_ROWS), ids, strict=False)]:
            self._rows.execute("BEGIN")
            self._rows.executemany("INSERT INTO rows (id) VALUES (?)", chunk)
            self._rows.execute("COMMIT")
        if self._first() is None:
            raise PredictionError(f"{self._sample} has no rows")
        self._rows.execute("CREATE INDEX by_id ON rows (id)")
        query = "SELECT id FROM rows GROUP BY id HAVING COUNT(*) > 1 ORDER BY MIN(place) LIMIT ?"
        twice = [called for (called,) in self._rows.execute(query, (_SHOWN + 1,))]
        if twice:
            raise PredictionError(f"{self._sample} has ids more than once: {_few(twice)}")

    def _refuse_too_many(self, num_samples: int, *, ids_are_index: bool) -> None:
        """Tell before anything is predicted that ids will be missing: later it may have taken hours."""
        (count,) = self._rows.execute("SELECT COUNT(*) FROM rows").fetchone()
        if count <= num_samples:
            return
        examples = ""
        if ids_are_index:
            ids = (called for (called,) in self._rows.execute("SELECT id FROM rows ORDER BY place"))
            strange = (i for i in ids if not (i.isdigit() and int(i) < num_samples and i == str(int(i))))
            examples = f" ({_few(list(islice(strange, _SHOWN)), count - num_samples)})"
        raise PredictionError(
            f"{self._sample} has {count:,} ids and the data {num_samples:,} samples: at least {count - num_samples:,} ids "
            f"would be missing among the predictions{examples}. Nothing was written"
        )

    def _ids(self) -> Iterator[str]:
        for number, row in _read(self._sample):
            if number > 1:
                if len(row) != len(self._header):
                    raise PredictionError(
                        f"{self._sample}:{number} has {len(row)} values, its header {len(self._header)} columns"
                    )
                for place, seen in self._seen.items():
                    seen.add(row[place])
                yield row[self._place]

    def _check_columns(self, names: Sequence[str]) -> None:
        if set(names) == set(self._header):
            return
        missing = [name for name in self._header if name not in names]
        extra = [name for name in names if name not in self._header]
        differing = [f"no column {_few(missing)}"] if missing else []
        differing += [f"{_few(extra)} besides"] if extra else []
        raise PredictionError(
            f"the columns of {self._sample} are {', '.join(self._header)}; the predictions have {' and '.join(differing)}: "
            "say in prediction.columns what each holds. Nothing was written"
        )

    def _check_kind(self, values: Sequence[str]) -> None:
        """Refuse numbers where the sample has texts: whoever scores them would compare names with numbers of classes."""
        for place, seen in self._seen.items():
            value, name = values[place], self._header[place]
            if not value or value in self._labels:
                continue
            if seen.all_texts and _is_number(value):
                raise PredictionError(
                    f"column {name!r} of {self._sample} holds texts, such as {seen.text!r}, and the predictions are numbers, "
                    f"such as {value}: say in prediction.labels what the classes are called. Nothing was written"
                )
            if seen.all_numbers and not _is_number(value):
                raise PredictionError(
                    f"column {name!r} of {self._sample} holds numbers, such as {seen.number}, and the predictions are texts, "
                    f"such as {value!r}: say in prediction.labels what is to be written for each class. Nothing was written"
                )

    def _knows(self, called: str) -> bool:
        return self._rows.execute("SELECT 1 FROM rows WHERE id = ? LIMIT 1", (called,)).fetchone() is not None

    def _first(self) -> str | None:
        found = self._rows.execute("SELECT id FROM rows ORDER BY place LIMIT 1").fetchone()
        return None if found is None else str(found[0])


class _Seen:
    """What one column of a sample holds: a text and a number of it, if there are any."""

    def __init__(self) -> None:
        self.text = self.number = ""

    def add(self, value: str) -> None:
        if _is_number(value):
            self.number = self.number or value
        elif any(letter.isalpha() for letter in value):  # "?" and "-" hold a place
            self.text = self.text or value

    @property
    def all_texts(self) -> bool:
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
        PredictionError: it cannot be read, or a column is there twice.
    """
    _, header = next(_read(sample), (0, []))
    if not header:
        raise PredictionError(f"{sample} is empty; a sample submission has a header and a row for each id")
    if len(set(header)) < len(header):
        raise PredictionError(f"{sample} has a column twice: {', '.join(header)}")
    return header


def _read(sample: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield line numbers and rows; blank lines are left out."""
    try:
        with sample.open(newline="", encoding="utf-8-sig") as file:
            reader: Any = csv.reader(file, strict=True)
            for row in reader:
                if row:
                    yield reader.line_num, row
    except OSError as error:
        raise PredictionError(f"{sample} cannot be read: {error.strerror or error}") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise PredictionError(f"{sample} is no CSV file in UTF-8: {error}") from error


def _few(ids: Sequence[str], count: int | None = None) -> str:
    shown = ", ".join(repr(called) for called in ids[:_SHOWN])
    return f"{shown}, …" if (count or len(ids)) > _SHOWN else shown
