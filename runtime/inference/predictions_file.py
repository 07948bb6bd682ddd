"""Prediction files: CSV, JSON lines or Parquet by the file's suffix. Ranks encode microbatches, rank 0 appends them."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from runtime.errors import ConfigurationError, MissingDependencyError, PredictionError, Problem
from runtime.inference.columns import Columns, Values
from runtime.state.atomic_folder import hidden_folder, put_in_place

_FAILURES = (
    OSError,
    ValueError,
    sqlite3.Error,
)  # pyarrow's errors are subclasses of the first two; submissions use SQLite
_ROWS_PER_GROUP = 1 << 16  # of Parquet; that many rows are held in memory


class FileFormat(Protocol):
    """A file format. Constructed on rank 0 with the file to append to; every rank encodes."""

    @staticmethod
    def encode(columns: Columns) -> bytes:
        """Return one microbatch's rows as bytes."""
        ...

    def append(self, payload: bytes) -> None:
        """Write the rows of the next microbatch."""
        ...

    def finish(self) -> None:
        """Write all buffered rows."""
        ...

    def close(self) -> None:
        """Release all resources, finished or not; the file is still open."""
        ...


class CsvFile:
    """A header and one line per row. Numbers have the fewest digits that read back as the same number of their type."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._names: list[str] = []

    @staticmethod
    def encode(columns: Columns) -> bytes:
        """Return the names as one line of JSON, followed by the rows."""
        rows = zip(*(texts(values) for values in columns.values()), strict=True)
        return with_names(columns, "".join(csv_lines(rows)).encode())

    def append(self, payload: bytes) -> None:
        """Write rows, and the header before the first of them."""
        names, body = split_names(payload)
        if not self._names:
            self._file.write("".join(csv_lines([names])).encode())
            self._names = names
        check_names(self._names, names)
        self._file.write(body)

    def finish(self) -> None:
        """Do nothing: no rows are buffered."""

    def close(self) -> None:
        """Do nothing: no resources are held."""


class JsonLinesFile:
    """One JSON object per line; NaN and infinities become null."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._names: list[str] = []

    @staticmethod
    def encode(columns: Columns) -> bytes:
        """Return the names as one line of JSON, followed by the rows."""
        rows = zip(*(_for_json(values) for values in columns.values()), strict=True)
        lines = (json.dumps(dict(zip(columns, row, strict=True)), ensure_ascii=False) for row in rows)
        return with_names(columns, "".join(f"{line}\n" for line in lines).encode())

    def append(self, payload: bytes) -> None:
        """Write rows."""
        names, body = split_names(payload)
        self._names = self._names or names
        check_names(self._names, names)
        self._file.write(body)

    def finish(self) -> None:
        """Do nothing: no rows are buffered."""

    def close(self) -> None:
        """Do nothing: no resources are held."""


class ParquetFile:
    """Typed columns, in row groups whose sizes depend only on the data."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._writer: Any = None
        self._held: list[Any] = []

    @staticmethod
    def encode(columns: Columns) -> bytes:
        """Return the rows as an Arrow stream."""
        import pyarrow as pa

        table = pa.table({name: pa.array(values) for name, values in columns.items()})
        stream = io.BytesIO()
        with pa.ipc.new_stream(stream, table.schema) as writer:
            writer.write_table(table)
        return stream.getvalue()

    def append(self, payload: bytes) -> None:
        """Buffer rows until a row group is full."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.ipc.open_stream(payload).read_all()
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._file, table.schema)
        check_names(self._writer.schema.names, table.schema.names)
        self._held.append(table.cast(self._writer.schema))
        if sum(held.num_rows for held in self._held) >= _ROWS_PER_GROUP:
            self._write_group()

    def finish(self) -> None:
        """Write the last row group and the footer."""
        if self._held:
            self._write_group()
        if self._writer is not None:
            self._writer.close()

    def close(self) -> None:
        """Close the writer now: its destructor would do so on a closed file."""
        self._held = []
        if self._writer is not None:
            with suppress(OSError, ValueError):
                self._writer.close()

    def _write_group(self) -> None:
        import pyarrow as pa

        table = pa.concat_tables(self._held).combine_chunks()
        self._writer.write_table(table, row_group_size=table.num_rows)
        self._held = []


_FORMATS: dict[str, type[FileFormat]] = {
    ".csv": CsvFile, ".jsonl": JsonLinesFile, ".ndjson": JsonLinesFile, ".parquet": ParquetFile,
}  # fmt: skip


def format_of(out: Path) -> type[FileFormat]:
    """Return the format for a file's suffix.

    Raises:
        ConfigurationError: the suffix is unknown.
        MissingDependencyError: the suffix is ``.parquet`` and pyarrow is not installed.
    """
    if out.suffix not in _FORMATS:
        message = f"{out} must end in .csv, .jsonl, .ndjson or .parquet"
        raise ConfigurationError([Problem("command line", "--output", message)])
    if out.suffix == ".parquet" and find_spec("pyarrow") is None:
        raise MissingDependencyError("pyarrow", "writing Parquet files", "parquet")
    return _FORMATS[out.suffix]


def check_target(out: Path, *, force: bool) -> None:
    """Refuse a file that cannot be written or already exists.

    Raises:
        PredictionError: the file cannot be written, or exists and ``force`` is False.
    """
    if out.is_dir():
        raise PredictionError(f"{out} cannot be written: it is a folder")
    if not out.parent.is_dir():
        raise PredictionError(f"{out} cannot be written: there is no folder {out.parent}")
    if os.path.lexists(out) and not force:
        raise PredictionError(f"{out} already exists; choose another name, or overwrite it with --force")


class PredictionsFile:
    """A file that is written atomically, on rank 0; closing it uncommitted discards everything.

    Args:
        out: the file.
        make: constructs the format with the open file to append to.
        force: overwrite an existing file.

    Attributes:
        problem: the first error in writing rows; later rows are ignored.
    """

    def __init__(self, out: Path, make: Callable[[BinaryIO], FileFormat], *, force: bool) -> None:
        self.problem: str | None = None
        self._out, self._make, self._force = out, make, force
        self._stack = ExitStack()

    def open(self) -> None:
        """Begin to write, under a hidden name.

        Raises:
            PredictionError: the file cannot be written, or already exists.
        """
        check_target(self._out, force=self._force)
        try:
            self._written = self._stack.enter_context(hidden_folder(self._out)) / self._out.name
            self._file = self._written.open("wb")
            self._stack.callback(_close, self._file)
            self._format = self._make(self._file)
            self._stack.callback(self._format.close)
        except _FAILURES as error:
            raise PredictionError(self._message(error)) from error

    def close(self) -> None:
        """Remove everything that was not committed."""
        self._stack.close()

    def append(self, payload: bytes) -> None:
        """Write the rows of the next microbatch; an error is kept in ``problem``."""
        if self.problem is None:
            try:
                self._format.append(payload)
            except (PredictionError, *_FAILURES) as error:
                self.problem = self._message(error)

    def raise_problem(self) -> None:
        """Raise the error in writing rows, if there was one.

        Raises:
            PredictionError: writing failed; no file was left.
        """
        if self.problem is not None:
            raise PredictionError(self.problem)

    def commit(self) -> None:
        """Finish the file and rename it to its final name.

        Raises:
            PredictionError: writing failed, now or before; no file was left.
        """
        self.raise_problem()
        try:
            self._format.finish()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            check_target(self._out, force=self._force)  # again: it may have been created meanwhile
            put_in_place(self._written, self._out)
        except _FAILURES as error:
            raise PredictionError(self._message(error)) from error

    def _message(self, error: Exception) -> str:
        if isinstance(error, PredictionError):
            return str(error)
        reason = getattr(error, "strerror", None) or error
        return f"{self._out} could not be written: {reason}; no incomplete file is left"


def _close(file: BinaryIO) -> None:
    with suppress(OSError):  # the disk is full, which has been reported
        file.close()


def texts(values: Values) -> Sequence[Any]:
    """Return values in their CSV form; float32 with the digits of a float32."""
    if not isinstance(values, np.ndarray):
        return values
    listed: list[Any] = (values.astype(str) if values.dtype.kind == "f" else values).tolist()
    return listed


def csv_lines(rows: Any) -> list[str]:
    """Return rows as lines of a CSV file."""
    lines: list[str] = []
    csv.writer(_Lines(lines), lineterminator="\n").writerows(rows)
    return lines


class _Lines:
    def __init__(self, lines: list[str]) -> None:
        self._lines = lines

    def write(self, line: str) -> None:
        self._lines.append(line)


def with_names(columns: Columns, body: bytes) -> bytes:
    """Prepend the columns' names to a microbatch's rows."""
    return json.dumps(list(columns)).encode() + b"\n" + body


def split_names(payload: bytes) -> tuple[list[str], bytes]:
    """Undo :func:`with_names`."""
    names, _, body = payload.partition(b"\n")
    return json.loads(names), body


def check_names(first: Sequence[str], names: Sequence[str]) -> None:
    """Refuse a microbatch whose columns differ from the first's.

    Raises:
        PredictionError: the columns differ.
    """
    if list(first) != list(names):
        raise PredictionError(
            f"the model's outputs differ in size: a microbatch gives the columns {', '.join(names)}, the first one gave "
            f"{', '.join(first)}"
        )


def _for_json(values: Values) -> Sequence[Any]:
    if not isinstance(values, np.ndarray) or values.dtype.kind != "f":
        return values if isinstance(values, list) else values.tolist()
    numbers = (float(text) for text in values.astype(str).tolist())
    return [number if math.isfinite(number) else None for number in numbers]
