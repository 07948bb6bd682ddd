"""Tables: numeric and categorical columns of a CSV or Parquet file, preprocessed with statistics of the training rows."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from runtime import json_files
from runtime.data_sources.columns import (
    Columns,
    NumberColumn,
    TextColumn,
    csv_names,
    is_parquet,
    parquet_names,
    read_csv,
    read_parquet,
)
from runtime.errors import DataError
from runtime.files import digest, existing, rows_within

MISSING = ("", "NA", "NaN", "nan", "null")
_WHOLE = re.compile("0|-?[1-9][0-9]*")
_TASKS = ("regression", "binary", "classification")


class Table(Dataset[dict[str, Any]]):
    """Rows of a CSV file, whose first line names the columns, or of a Parquet file (``pip install pyarrow``), in memory.

    Missing numbers are filled, numbers standardised; categories are numbered or one-hot encoded. The statistics (means,
    standard deviations, categories) are fitted on training rows only: the runtime calls ``fit`` with them and passes the
    result, ``fitted``, to the other splits. A category not in the training rows is unknown: all zeros, or code 0.

    Args:
        path: the file.
        target: column to predict, or columns (regression). Default: none, for data to predict.
        task: ``regression``: float32 (targets,). ``binary``: 0 or 1, float32 (1,). ``classification``: int64 scalar.
            Classes are the sorted values of the training rows.
        numeric: numeric columns. Default: every column that is not named elsewhere.
        categorical: categorical columns. A missing value is a separate category.
        keep: columns added to samples under their names, for ``data.fields.id``, ``group`` or ``weight``: int64, float64, or
            texts.
        categorical_as: ``one_hot``: appended to the numbers in ``inputs``. ``codes``: the batch has ``numeric`` and
            ``categorical`` ((columns,) int64, 0 for unknown, for embeddings) instead of ``inputs``.
        missing: ``error``: a missing number is an error. ``mean``, ``median``: filled with that of the training rows.
        indicators: add an input for each numeric column: 1 where the number was missing.
        missing_values: texts that count as missing; a Parquet file's nulls always do.
        standardize: scale numbers to mean 0 and standard deviation 1 over the training rows.
        standardize_target: the same for a regression's target. Losses and metrics are then in those units; in predictions,
            ``prediction`` is in the file's units, and ``output`` is the model's output.
        delimiter: between two values of a CSV file. Default: a comma.
        encoding: of a CSV file. Default: UTF-8.
        preprocessing: a ``preprocessing.json`` from an earlier run's folder, used instead of fitting.
        provided_by: command that installs the file, for the error message if it is missing.

    Raises:
        DataError: the file or a column is missing, or a value has the wrong type; the message names file, line and column.
    """

    deterministic = True
    shared_arguments = (
        "numeric",
        "categorical",
        "categorical_as",
        "missing",
        "indicators",
        "missing_values",
        "standardize",
        "delimiter",
        "encoding",
    )
    """Arguments that data to predict takes over from the training data: how rows are read and preprocessed."""

    def __init__(
        self,
        path: str,
        *,
        target: str | Sequence[str] | None = None,
        task: Literal["regression", "binary", "classification"] | None = None,
        numeric: Sequence[str] | None = None,
        categorical: Sequence[str] = (),
        keep: Sequence[str] = (),
        categorical_as: Literal["one_hot", "codes"] = "one_hot",
        missing: Literal["error", "mean", "median"] = "error",
        indicators: bool = False,
        missing_values: Sequence[str] = MISSING,
        standardize: bool = True,
        standardize_target: bool = False,
        delimiter: str | None = None,
        encoding: str | None = None,
        preprocessing: str | None = None,
        provided_by: str | None = None,
    ) -> None:
        self._path = existing(path, provided_by=provided_by)
        self._is_parquet = is_parquet(self._path)
        if self._is_parquet and (delimiter or encoding):
            raise DataError(f"{self._path} is a Parquet file; leave out 'delimiter' and 'encoding'")
        self._csv = {"delimiter": delimiter or ",", "encoding": encoding or "utf-8"}
        self._targets = [target] if isinstance(target, str) else list(target or ())
        self._task = task
        self._check_choices(categorical_as, missing, standardize_target)
        used = [*self._targets, *categorical, *keep]
        self._numeric = [name for name in self._names() if name not in used] if numeric is None else list(numeric)
        self._categorical, self._keep = list(categorical), list(keep)
        all_names = [*self._numeric, *used]
        for name in all_names:
            if all_names.count(name) > 1:
                raise DataError(f"column {name!r} is named twice among numeric, categorical, keep and target")
        self._codes, self._missing, self._indicators = categorical_as == "codes", missing, indicators
        self._standardize, self._standardize_target = standardize, standardize_target
        regression = self._targets if task == "regression" else []
        self._columns = self._read(
            numbers=[*self._numeric, *regression],
            texts=[name for name in used if name not in regression],
            missing=missing_values,
        )
        self._kept = {name: _as_numbers(self._columns[name]) for name in self._keep}
        self._file_digest = digest(self._path)
        self._size = len(next(iter(self._columns.values()))) if self._columns else 0
        self._preprocessing = None if preprocessing is None else existing(preprocessing)
        self._fitted: dict[str, Any] | None = None
        self._check_whole()
        if self._preprocessing is not None:
            self.adopt(_read_json(self._preprocessing))

    @staticmethod
    def arguments_of(fitted: Mapping[str, Any]) -> dict[str, Any]:
        """Return the constructor arguments for data to predict, given ``fitted``: the numeric columns."""
        return {"numeric": list(fitted["numeric"])}

    def __len__(self) -> int:
        return self._size

    @property
    def prepared(self) -> bool:
        """Whether statistics come from ``preprocessing``, so that no fitting is needed."""
        return self._preprocessing is not None

    @property
    def fingerprint(self) -> str:
        """Digests of the file and of ``fitted``."""
        fitted = blake2b(json.dumps(self.fitted, sort_keys=True).encode(), digest_size=8).hexdigest()
        return f"table {self._file_digest} {fitted}"

    @property
    def fitted(self) -> dict[str, Any]:
        """Statistics of the training rows, JSON-serialisable. Fitted on all rows if ``fit`` was not called."""
        if self._fitted is None:
            self.fit(np.arange(len(self), dtype=np.int64))
        assert self._fitted is not None
        return self._fitted

    @property
    def target_scale(self) -> list[dict[str, float]] | None:
        """Mean and standard deviation of each target, if they are standardised."""
        return list(self.fitted["target"].values()) if self._standardize_target else None

    @property
    def features(self) -> list[str]:
        """Names of the columns of ``inputs`` (of ``numeric``, if categories are codes)."""
        indicators = [f"{name} missing" for name in self._numeric] if self._indicators else []
        one_hot = [f"{name}={value}" for name, values in self.fitted["categories"].items() for value in values]
        return [*self._numeric, *indicators, *([] if self._codes else one_hot)]

    @property
    def classes(self) -> list[str]:
        """Names of the target's classes, in order; if there are several targets, the names of the targets."""
        return list(self.fitted["classes"]) if len(self._targets) == 1 else list(self._targets)

    def fit(self, rows: NDArray[np.int64]) -> None:
        """Fit fill values, means, deviations, categories and classes on these rows; does nothing with ``preprocessing``.

        Raises:
            DataError: a numeric column has no number in them, or a binary target does not have two classes.
        """
        if self._preprocessing is not None:
            return
        fitted: dict[str, Any] = {"numeric": {}, "categories": {}, "target": {}, "classes": []}
        for name in self._numeric:
            values = self._numbers(name)[rows]
            present = values[~np.isnan(values)]
            if not present.size:
                raise DataError(f"{self._path}: column {name!r} has no number in the training rows")
            fill = float(np.median(present) if self._missing == "median" else present.mean())
            fitted["numeric"][name] = {"fill": fill, **_scale(np.where(np.isnan(values), fill, values))}
        for name in self._categorical:
            categories = set(self._text(name).of(rows))
            fitted["categories"][name] = sorted(categories - {None}) + ([None] if None in categories else [])  # type: ignore[type-var]
        if self._task == "regression":
            fitted["target"] = {name: _scale(self._numbers(name)[rows]) for name in self._targets}
        elif self._task is not None:
            fitted["classes"] = _sorted_labels({str(label) for label in self._text(self._targets[0]).of(rows)})
            if self._task == "binary" and len(fitted["classes"]) != 2:
                raise DataError(
                    f"{self._path}: column {self._targets[0]!r} has {len(fitted['classes'])} classes in the training "
                    "rows; 'binary' needs two"
                )
        self.adopt(fitted)

    def adopt(self, fitted: Mapping[str, Any]) -> None:
        """Use the statistics fitted by another split or an earlier run.

        Raises:
            DataError: they are for other columns.
        """
        for kind, names in (("numeric", self._numeric), ("categories", self._categorical)):
            if list(fitted.get(kind, {})) != names:
                raise DataError(
                    f"{self._path}: preprocessing was fitted with the {kind} columns {list(fitted.get(kind, {}))}, but this "
                    f"table has {names}"
                )
        self._fitted = dict(fitted)
        self._places = {}
        for name, values in fitted["categories"].items():
            place = {value: number for number, value in enumerate(values, start=1)}
            known: list[str | None] = [*self._text(name).known, None]  # None last: the code of missing values is -1
            self._places[name] = np.array([place.get(value, 0) for value in known], dtype=np.int64)
        if self._targets and self._task != "regression":
            place = {value: number for number, value in enumerate(fitted["classes"])}
            labels = self._text(self._targets[0]).known
            self._classes_of = np.array([place.get(label, -1) for label in labels], dtype=np.int64)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return the parts of one row."""
        return {name: part[0] for name, part in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        """Return a batch: ``inputs`` (rows, features) float32 or ``numeric`` and ``categorical``; ``target``; ``keep``."""
        rows, fitted = rows_within(indices, len(self)), self.fitted
        numbers = np.empty((len(rows), len(self._numeric)))
        for place, name in enumerate(self._numeric):
            numbers[:, place] = self._numbers(name)[rows]
        absent = np.isnan(numbers)
        if self._numeric:
            statistics = fitted["numeric"].values()
            numbers = np.where(absent, [column["fill"] for column in statistics], numbers)
            if self._standardize:
                means, stds = ([column[name] for column in statistics] for name in ("mean", "std"))
                numbers = (numbers - means) / stds
        if self._indicators:
            numbers = np.concatenate([numbers, absent], axis=1)
        codes = [places[self._text(name).codes[rows]] for name, places in self._places.items()]
        batch: dict[str, Any] = {}
        if self._codes:
            batch["numeric"] = torch.from_numpy(numbers.astype(np.float32))
            batch["categorical"] = torch.from_numpy(
                np.stack(codes, axis=1) if codes else np.zeros((len(rows), 0), np.int64)
            )
        else:
            widths = [len(values) for values in fitted["categories"].values()]
            hot = [np.eye(width + 1)[code][:, 1:] for code, width in zip(codes, widths, strict=True)]
            batch["inputs"] = torch.from_numpy(np.concatenate([numbers, *hot], axis=1).astype(np.float32))
        if self._targets:
            batch["target"] = self.targets(rows)
        return {**batch, **{name: _rows_of(values, rows) for name, values in self._kept.items()}}

    def column(self, name: str) -> NDArray[Any]:
        """Return a column: numbers, NaN where missing, or texts, empty where missing."""
        if name not in self._columns:
            return self.as_written(name)
        column = self._columns[name]
        if isinstance(column, NumberColumn):
            return column.values
        return np.array([*column.known, ""], dtype=object)[column.codes]

    def as_written(self, name: str) -> NDArray[Any]:
        """Return a column as written in the file, read again: int64 or float64 if all values are such numbers, else texts.

        Raises:
            DataError: the file has no such column.
        """
        column = _as_numbers(self._read(numbers=(), texts=[name], missing=())[name])
        return np.array([*column.known, None], dtype=object)[column.codes] if isinstance(column, TextColumn) else column

    def targets(self, rows: NDArray[np.int64]) -> Tensor:
        """Return the targets of some rows, in the dtype and shape of the task.

        Raises:
            DataError: a row's class is not among those of the training rows.
        """
        fitted = self.fitted
        if self._task == "regression":
            values = np.stack([self._numbers(name)[rows] for name in self._targets], axis=1)
            if self._standardize_target:
                statistics = fitted["target"].values()
                means, stds = ([column[name] for column in statistics] for name in ("mean", "std"))
                values = (values - means) / stds
            return torch.from_numpy(values.astype(np.float32))
        text = self._text(self._targets[0])
        classes = self._classes_of[text.codes[rows]]
        if (classes < 0).any():
            label = text.of(rows)[int(np.argmin(classes))]
            raise DataError(
                f"{self._path}: column {self._targets[0]!r} has {label!r}, which is not in the training rows "
                f"(they have {', '.join(map(repr, self.classes[:10]))})"
            )
        return torch.from_numpy(classes[:, np.newaxis].astype(np.float32) if self._task == "binary" else classes)

    def _numbers(self, name: str) -> NDArray[np.float64]:
        column = self._columns[name]
        assert isinstance(column, NumberColumn)
        return column.values

    def _text(self, name: str) -> TextColumn:
        column = self._columns[name]
        assert isinstance(column, TextColumn)
        return column

    def _check_choices(self, categorical_as: str, missing: str, standardize_target: bool) -> None:
        if (self._task is None) != (not self._targets) or self._task not in (None, *_TASKS):
            raise DataError(f"'target' and 'task' must be given together; 'task' is one of {', '.join(_TASKS)}")
        if self._task != "regression" and len(self._targets) > 1:
            raise DataError(f"{self._task} has one target, not {len(self._targets)}")
        if categorical_as not in ("one_hot", "codes"):
            raise DataError(f"categorical_as={categorical_as!r}: use 'one_hot' or 'codes'")
        if missing not in ("error", "mean", "median"):
            raise DataError(f"missing={missing!r}: use 'error', 'mean' or 'median'")
        if standardize_target and self._task != "regression":
            raise DataError("standardize_target: only the target of a regression can be standardised")

    def _check_whole(self) -> None:
        """Raise for missing targets, and for missing numbers unless ``missing`` fills them."""
        needed = [*(self._numeric if self._missing == "error" else ()), *self._targets]
        for name in needed:
            column = self._columns[name]
            absent = np.isnan(column.values) if isinstance(column, NumberColumn) else column.codes < 0
            if absent.any():
                hint = "" if name in self._targets else ": set missing: mean (or median)"
                raise DataError(
                    f"{self._path}: column {name!r} has no value in {int(absent.sum())} of {len(absent)} rows, first in "
                    f"row {int(np.argmax(absent))} (counted from 0){hint}"
                )

    def _names(self) -> list[str]:
        return parquet_names(self._path) if self._is_parquet else csv_names(self._path, **self._csv)

    def _read(self, *, numbers: Sequence[str], texts: Sequence[str], missing: Sequence[str]) -> Columns:
        if self._is_parquet:
            return read_parquet(self._path, numbers=numbers, texts=texts, missing=missing)
        return read_csv(self._path, numbers=numbers, texts=texts, missing=missing, **self._csv)


def _scale(values: NDArray[np.float64]) -> dict[str, float]:
    """Return mean and standard deviation; 1 for a constant column, which is then only shifted."""
    std = float(values.std())
    return {"mean": float(values.mean()), "std": std if std > 0 else 1.0}


def _sorted_labels(labels: set[str]) -> list[str]:
    """Sort class names, as numbers if all are numbers: 2 before 10. Equal numbers, such as 1 and 1.0, are sorted as text."""
    try:
        numbers = {label: float(label) for label in labels}
    except ValueError:
        return sorted(labels)
    finite = all(math.isfinite(number) for number in numbers.values())  # NaN cannot be ordered
    return sorted(labels, key=lambda label: (numbers[label], label)) if finite else sorted(labels)


def _as_numbers(column: NumberColumn | TextColumn) -> NDArray[Any] | TextColumn:
    """Convert a column of texts to int64 or float64 if possible, else return it unchanged.

    If any number has leading zeros or exceeds 64 bits, all values stay texts: ids are written into predictions exactly as
    they are in the file.
    """
    assert isinstance(column, TextColumn)
    known = [value.strip() for value in column.known]
    whole = [value for value in known if value.lstrip("+-").replace("_", "").isdecimal()]
    if (column.codes < 0).any() or not all(_WHOLE.fullmatch(value) and abs(int(value)) < 2**63 for value in whole):
        return column
    try:
        return np.array(known, dtype=np.int64 if len(whole) == len(known) else np.float64)[column.codes]
    except ValueError:
        return column


def _rows_of(values: NDArray[Any] | TextColumn, rows: NDArray[np.int64]) -> Any:
    return values.of(rows) if isinstance(values, TextColumn) else torch.from_numpy(values[rows])


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json_files.read(path)
    except ValueError as error:
        raise DataError(f"{path} is not a JSON file: {error}") from error
    return content
