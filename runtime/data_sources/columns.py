"""Read columns of CSV and Parquet files, as numbers or as codes of texts."""

from __future__ import annotations

import csv
from array import array
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import DataError, MissingDependencyError
from runtime.wording import did_you_mean

_BLOCK = 10_000  # rows parsed at once


@dataclass(frozen=True)
class NumberColumn:
    """A column of numbers: (rows,) float64, NaN where missing."""

    values: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.values)


@dataclass(frozen=True)
class TextColumn:
    """A column of texts: codes (rows,) int32 into ``known``, -1 where missing."""

    codes: NDArray[np.int32]
    known: list[str]

    def __len__(self) -> int:
        return len(self.codes)

    def of(self, rows: NDArray[np.int64]) -> list[str | None]:
        """Return the texts of some rows, None where missing."""
        with_missing = [*self.known, None]
        return [with_missing[code] for code in self.codes[rows].tolist()]


Columns = dict[str, NumberColumn | TextColumn]


def checked_names(names: Sequence[str], wanted: Collection[str], path: Path) -> None:
    """Check that the file has the wanted columns, and no two of the same name.

    Raises:
        DataError: it does not; the message names the column and the most similar name.
    """
    duplicates = sorted({name for name in names if list(names).count(name) > 1})
    if duplicates:
        raise DataError(f"{path} has more than one column {duplicates[0]!r}")
    for name in wanted:
        if name not in names:
            hint = did_you_mean(name, names) or f"; it has {', '.join(map(repr, names))}"
            raise DataError(f"{path} has no column {name!r}{hint}")


def csv_names(path: Path, *, delimiter: str, encoding: str) -> list[str]:
    """Return the column names, read from the first line."""
    with path.open(encoding=encoding, newline="") as file:
        try:
            return next(csv.reader(file, delimiter=delimiter, strict=True))
        except StopIteration:
            raise DataError(f"{path} is empty; its first line must name the columns") from None
        except (UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{path} cannot be read as {encoding} CSV: {error}") from error


def read_csv(
    path: Path,
    *,
    numbers: Collection[str],
    texts: Collection[str],
    missing: Collection[str],
    delimiter: str,
    encoding: str,
) -> Columns:
    """Read some columns of a CSV file whose first line names them.

    Raises:
        DataError: the file cannot be read; the message names file, line and column.
    """
    names = csv_names(path, delimiter=delimiter, encoding=encoding)
    checked_names(names, [*numbers, *texts], path)
    values = {name: array("d") for name in numbers}
    codes: dict[str, array[int]] = {name: array("i") for name in texts}
    known: dict[str, dict[str, int]] = {name: {} for name in texts}
    absent = frozenset(missing)
    for first_line, block in _blocks(path, len(names), delimiter=delimiter, encoding=encoding):
        columns = dict(zip(names, zip(*block, strict=True), strict=True))
        for name, into in values.items():
            try:
                into.extend([float(value) if value not in absent else np.nan for value in columns[name]])
            except ValueError:
                raise _not_a_number(path, first_line, name, columns[name], absent) from None
        for name, index in known.items():
            codes[name].extend(
                [-1 if value in absent else index.setdefault(value, len(index)) for value in columns[name]]
            )
    return {
        **{name: NumberColumn(np.frombuffer(numbers, dtype=np.float64)) for name, numbers in values.items()},
        **{name: TextColumn(np.frombuffer(codes[name], dtype=np.int32), list(index)) for name, index in known.items()},
    }


def _blocks(path: Path, width: int, *, delimiter: str, encoding: str) -> Iterator[tuple[list[int], list[list[str]]]]:
    """Yield blocks of rows, with the number of each row's last line; empty lines are skipped."""
    with path.open(encoding=encoding, newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        next(reader)
        try:
            while numbered := [(reader.line_num, row) for row in islice(reader, _BLOCK)]:
                rows = [(line, row) for line, row in numbered if row]
                for line, row in rows:
                    if len(row) != width:
                        raise DataError(f"{path}:{line} has {len(row)} values; the first line names {width} columns")
                if rows:
                    yield [line for line, _ in rows], [row for _, row in rows]
        except (UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{path}:{reader.line_num} cannot be read as {encoding} CSV: {error}") from error


def _not_a_number(path: Path, lines: list[int], name: str, values: Sequence[str], absent: Collection[str]) -> DataError:
    for line, value in zip(lines, values, strict=True):
        try:
            float(0 if value in absent else value)
        except ValueError:
            return DataError(
                f"{path}:{line} has {value!r} in column {name!r}, which is not a number: list the column under "
                f"'categorical', or add {value!r} to 'missing_values'"
            )
    raise AssertionError("every value is a number")


def is_parquet(path: Path) -> bool:
    """Return whether a file is a Parquet file, by its first bytes."""
    with path.open("rb") as file:
        return file.read(4) == b"PAR1"


def parquet_names(path: Path) -> list[str]:
    """Return the column names of a Parquet file."""
    return list(_parquet(path).schema_arrow.names)


def read_parquet(path: Path, *, numbers: Collection[str], texts: Collection[str], missing: Collection[str]) -> Columns:
    """Read some columns of a Parquet file.

    Raises:
        DataError: the file cannot be read; the message names file and column.
        MissingDependencyError: pyarrow is not installed.
    """
    file = _parquet(path)
    checked_names(list(file.schema_arrow.names), [*numbers, *texts], path)
    import pyarrow as pa

    table = file.read(columns=[*numbers, *texts])
    columns: Columns = {}
    for name in numbers:
        column = table.column(name)
        if pa.types.is_boolean(column.type):
            column = column.cast(pa.uint8())
        try:
            columns[name] = NumberColumn(column.cast(pa.float64(), safe=False).to_numpy())
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            raise DataError(
                f"{path} has {column.type} in column {name!r}, not numbers: list it under 'categorical'"
            ) from None
    for name in texts:
        columns[name] = _texts(table.column(name), name, path, missing)
    return columns


def _texts(column: Any, name: str, path: Path, missing: Collection[str]) -> TextColumn:
    import pyarrow as pa

    try:
        values = column.cast(pa.string()).combine_chunks().dictionary_encode()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise DataError(f"{path} has {column.type} in column {name!r}, not texts") from None
    values = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    known = values.dictionary.to_pylist()
    codes = values.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int32)
    kept = [text for text in known if text not in missing]
    place = {text: number for number, text in enumerate(kept)}
    recoded = np.array([*(place.get(text, -1) for text in known), -1], dtype=np.int32)
    return TextColumn(recoded[codes], kept)


def _parquet(path: Path) -> Any:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ModuleNotFoundError as error:
        raise MissingDependencyError("pyarrow", "a Parquet file", "parquet") from error
    try:
        return pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise DataError(f"{path} is not a Parquet file: {error}") from error
