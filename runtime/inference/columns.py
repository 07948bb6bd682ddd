"""Columns of a predictions file, made from the model's output: one row per sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from runtime.config.component import described
from runtime.config.sections import PredictionSection
from runtime.data.fields import COLUMN, Fields, Name, part_of
from runtime.errors import ConfigurationError, DataError, EvaluationError, LockstepError, ObjectiveError, Problem
from runtime.objective import describe, dtype_name, full_precision
from runtime.wording import did_you_mean

Values = np.ndarray[Any, Any] | list[Any]
"""One value per sample: an array of numbers, or a list of strings or numbers."""
Columns = dict[str, Values]
"""Name to values, in the order of the file."""

_CLASSIFICATION = ("class", "probability", "probabilities")
_DERIVED = ("class", "prediction", "probability", "top_classes", "top_probabilities")


class ColumnBuilder:
    """Makes the columns that the configuration requests.

    Args:
        section: ``prediction`` in the YAML.
        wanted: column name in the file to its kind (``id``, ``prediction``, ``probability``, …); empty for the default.
        problem: makes a :class:`Problem` from a key and a message.
        names: the data's names of its classes, or of several targets; they name predictions where the configuration has no
            labels and the model has that number of classes, or else of outputs.
        scale: mean and standard deviation of each standardised target; ``prediction`` is in the targets' original units.
    """

    def __init__(
        self,
        section: PredictionSection,
        wanted: Mapping[str, str],
        problem: Callable[[Sequence[str], str], Problem],
        names: Sequence[str] = (),
        scale: Sequence[Mapping[str, float]] | None = None,
    ) -> None:
        self._wanted = wanted
        self._labels, self._top_k = section.labels, section.top_k
        self._names = _labels_of(names)
        self._scale = scale
        self._problem = problem

    def depend_on_positions(self, fields: Fields) -> bool:
        """Return whether a column is derived from a sample's position in the data set rather than from its batch."""
        kinds = set(self._wanted.values()) or {"id"}
        by_place = "index" in kinds or any(kind.startswith(COLUMN) for kind in kinds)
        return by_place or (fields.id is None and "id" in kinds)

    def build(
        self,
        predictions: Mapping[str, Tensor],
        ids: Values,
        index: Values,
        part_of_data: Callable[[str], Values] | None = None,
    ) -> Columns:
        """Return the columns of one microbatch.

        Args:
            predictions: the objective's predictions, one row per sample.
            ids: the samples' ids.
            index: their positions in the data set.
            part_of_data: returns a part of the data by its name.

        Raises:
            ConfigurationError: a column requests something that does not exist.
            EvaluationError: the model's output does not have one row for each sample.
        """
        arrays = {name: _rows(name, tensor, len(index)) for name, tensor in predictions.items()}
        self._check_labels(arrays)
        wanted = self._wanted or {
            "id": "id",
            "prediction": "prediction",
            **({"probability": "probability"} if {"probability", "probabilities"} & set(arrays) else {}),
        }
        columns: Columns = {}
        for name, kind in wanted.items():
            values = {"id": ids, "index": index}.get(kind)
            if kind.startswith(COLUMN) and part_of_data is not None:
                try:
                    values = part_of_data(kind.removeprefix(COLUMN))
                except DataError as error:
                    raise self._wrong(name, str(error)) from error
            if values is not None:
                new = {name: values}
            else:
                new = self._name_columns(name, kind, self._values(name, kind, arrays), arrays)
            if duplicates := columns.keys() & new.keys():
                raise self._wrong(name, f"makes a second column {min(duplicates)!r}")
            columns |= new
        return columns

    def _values(self, name: str, kind: str, arrays: Mapping[str, Any]) -> Any:
        """Return a column's values: the objective's, or derived from its probabilities."""
        many, single = arrays.get("probabilities"), arrays.get("probability")
        if kind in arrays:
            return arrays[kind]
        if kind == "prediction":
            classes = self._class(arrays)
            if classes is None:
                return self._unstandardised(arrays.get("output", next(iter(arrays.values()))))
            labelled = self._labels and (many is not None or classes.ndim == 1)
            return np.array(self._labels, dtype=object)[classes] if labelled else classes
        if kind == "class" and (classes := self._class(arrays)) is not None:
            return classes
        if kind == "probability" and many is not None:
            return many.max(-1)
        if kind in ("top_classes", "top_probabilities") and many is not None:
            return self._top_k_values(many, as_classes=kind == "top_classes")
        possible = ["id", "index", "prediction", *arrays]
        possible += [
            k for k in _DERIVED if k not in possible and (many is not None or (k == "class" and single is not None))
        ]
        known = did_you_mean(kind, possible) or f"; known here: {', '.join(possible)}"
        raise self._wrong(name, f"holds {kind!r}, which the objective does not give{known}")

    def _unstandardised(self, values: Any) -> Any:
        """Undo the standardisation of the targets."""
        width = 1 if values.ndim == 1 else values.shape[-1]
        if self._scale is None or width != len(self._scale):
            return values
        mean, std = (np.array([of_target[key] for of_target in self._scale]) for key in ("mean", "std"))
        return (values.astype(np.float64) * std + mean).astype(values.dtype)

    def _class(self, arrays: Mapping[str, Any]) -> Any:
        if "class" in arrays:
            return arrays["class"]
        if "probabilities" in arrays:
            return arrays["probabilities"].argmax(-1)
        # torchmetrics' default threshold.
        return (arrays["probability"] > 0.5).astype(np.int64) if "probability" in arrays else None

    def _top_k_values(self, probabilities: Any, *, as_classes: bool) -> Any:
        best = np.argsort(-probabilities, axis=-1, kind="stable")[..., : self._top_k]
        if not as_classes:
            return np.take_along_axis(probabilities, best, -1)
        return np.array(self._labels, dtype=object)[best] if self._labels else best

    def _name_columns(self, name: str, kind: str, values: Any, arrays: Mapping[str, Any]) -> Columns:
        if values.ndim == 1:
            return {name: _plain(values)}
        if values.ndim > 2:
            raise self._wrong(
                name,
                f"needs one number or one row of numbers per sample; {kind!r} has the shape {tuple(values.shape[1:])} "
                "for each; a custom objective can choose what to write (predicted)",
            )
        width = values.shape[1]
        parts: Sequence[Any] = range(1, width + 1) if kind.startswith("top_") else range(width)
        if self._labels and width == len(self._labels) and self._one_per_class(kind, arrays):
            parts = self._labels
        elif width == len(self._names) and kind in ("output", "prediction") and not {*_CLASSIFICATION} & set(arrays):
            parts = self._names
        pattern = name if "{}" in name else f"{name}_{{}}"
        return {pattern.replace("{}", str(part)): _plain(values[:, i]) for i, part in enumerate(parts)}

    def _one_per_class(self, kind: str, arrays: Mapping[str, Any]) -> bool:
        """Return whether a row has one number for each class, in their order."""
        if "probabilities" in arrays:
            return kind in ("probabilities", "output")
        several_labels = "probability" in arrays and arrays["probability"].ndim > 1
        return several_labels and kind in ("probability", "output", "class", "prediction")

    def _check_labels(self, arrays: Mapping[str, Any]) -> None:
        if not self._labels or self._labels is self._names:
            self._labels = self._names if len(self._names) == _num_classes(arrays) else []
            return
        classes = _num_classes(arrays)
        if classes is None and "class" in arrays:
            largest = int(arrays["class"].max(initial=0))
            classes = largest + 1 if largest >= len(self._labels) else len(self._labels)
        if classes is None:
            message = "there are no classes to name: the objective gives no probabilities; leave 'labels' out"
            raise ConfigurationError([self._problem(("prediction", "labels"), message)])
        if classes != len(self._labels):
            message = f"{len(self._labels)} labels for {classes} classes"
            raise ConfigurationError([self._problem(("prediction", "labels"), message)])

    def _wrong(self, name: str, message: str) -> ConfigurationError:
        key = ("prediction", "columns", name) if name in self._wanted else ("prediction", "columns")
        return ConfigurationError([self._problem(key, message)])


def _labels_of(names: Sequence[str]) -> list[str | int]:
    """Return class names in the data's type: as integers, if all of them are."""
    whole = all(name.removeprefix("-").isdecimal() and str(int(name)) == name for name in names)
    return [int(name) for name in names] if whole else list(names)


def _num_classes(arrays: Mapping[str, Any]) -> int | None:
    """Return the number of classes (or labels) of the probabilities; None if there are none."""
    if "probabilities" in arrays:
        return int(arrays["probabilities"].shape[-1])
    if "probability" in arrays:
        return int(arrays["probability"].shape[1]) if arrays["probability"].ndim > 1 else 2
    return None


def model_arguments(fields: Fields, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the model's positional and keyword arguments from a batch that may have no target.

    Raises:
        ObjectiveError: the model's part of the batch is not known.
    """
    if isinstance(batch, Tensor):
        if fields.inputs not in (None, 0):
            raise ObjectiveError(
                f"data.fields.inputs names {fields.inputs!r}, but a batch to predict is a single tensor"
            )
        return (batch,), {}
    if fields.inputs is not None:
        return fields.arguments(batch)
    if isinstance(batch, Mapping) and "inputs" in batch:
        batch = {"inputs": batch["inputs"], "target": None}
    elif isinstance(batch, list | tuple) and len(batch) == 1:
        batch = (batch[0], None)
    return fields.arguments(batch)


def one_per_sample(values: Any, count: int, what: str, *, may_lack: bool = False) -> Values:
    """Return a part of a batch as one string or number for each sample.

    Args:
        values: the part.
        count: number of samples.
        what: the part's name in messages.
        may_lack: whether a sample may have None.

    Raises:
        DataError: the part is something else.
    """
    if isinstance(values, Tensor):
        values = full_precision(values).cpu().numpy()
    listed = isinstance(values, np.ndarray | list | tuple) and np.ndim(values) == 1
    if listed and len(values) != count:
        raise DataError(
            f"{what} has {len(values)} values for {count} samples; data.collate (or the data set's __getitems__) must keep "
            "every sample"
        )
    if not listed or not all(isinstance(v, str | int | float | np.generic) or (may_lack and v is None) for v in values):
        raise DataError(f"{what} must be one string or number for each of {count} samples")
    if isinstance(values, np.ndarray) and values.dtype.kind in "iuf":
        return values
    return [value.item() if isinstance(value, np.generic) else value for value in values]


class DataColumns:
    """Reads ids and other parts of the data to write next to the predictions: from the batch, else from the data set.

    A data set has columns if it has ``as_written(name)``, which returns them as in its file, or ``column(name)``.

    Args:
        source: the data set.
    """

    def __init__(self, source: Any) -> None:
        self._source = source
        self._columns: dict[str, Any] = {}

    def has_column(self, name: str) -> bool:
        """Return whether the data set has a column of this name."""
        try:
            return self._column(name) is not None
        except DataError:
            return False

    def ids(self, batch: Any, index: Values, name: Name | None) -> Values:
        """Return the ids of a batch's samples: the named part, or their positions in the data set if ``name`` is None.

        Raises:
            DataError: there is no such part, or it is not one string or number for each sample.
        """
        if name is None:
            return index
        try:
            ids = self._part(batch, index, name)
        except DataError as error:
            raise DataError(f"data.fields.id: {error}") from error
        return one_per_sample(ids, len(index), f"data.fields.id: {name!r}")

    def of(self, batch: Any, index: Any, name: str) -> Values:
        """Return one string, number or None for each sample of a batch.

        Raises:
            DataError: there is no such part, or it is something else.
        """
        key: Name = int(name) if name.isdecimal() and isinstance(batch, list | tuple) else name
        values = self._part(batch, index, key)
        return one_per_sample(values, len(index), f"column {name!r} of the data", may_lack=True)

    def _part(self, batch: Any, index: Any, name: Name) -> Any:
        single = isinstance(batch, Tensor)  # its parts would be its rows
        try:
            if not single:
                return part_of(batch, name)
            why = f"the batch is {describe(batch)}"
        except ObjectiveError as error:
            why = str(error).partition(": ")[2]
        column = self._column(name) if isinstance(name, str) else None
        if column is None:
            raise DataError(f"the data has no part {name!r}: {why}, and the data set has no column(name) method")
        return column[index]

    def _column(self, name: str) -> Any:
        """Return a column of the data set, or None if the data set has no columns."""
        if name not in self._columns:
            ids = getattr(self._source, "ids", None)
            whole = self._source if ids is None else self._source.source
            read = getattr(whole, "as_written", None) or getattr(whole, "column", None)
            column = None if read is None else _read_column(whole, read, name)
            self._columns[name] = column if ids is None or column is None else column[ids]
        return self._columns[name]


def _read_column(source: Any, read: Callable[[str], Any], name: str) -> Any:
    """Return a column read by the data set's method, which may be user code."""
    try:
        column = np.asarray(read(name))
    except LockstepError:
        raise
    except Exception as error:
        raise DataError(f"{type(source).__name__}.{read.__name__}({name!r}) raised {described(error)}") from error
    if column.shape[:1] != (len(source),):
        raise DataError(
            f"{type(source).__name__}.{read.__name__}({name!r}) has the shape {column.shape} for {len(source)} samples"
        )
    return column


def _rows(name: str, prediction: Any, count: int) -> Any:
    if not isinstance(prediction, Tensor):
        raise EvaluationError(
            f"predictions: {name!r} is a {type(prediction).__name__}, not a tensor; set model.output to the part of what the "
            "model returns that is its output"
        )
    if prediction.ndim == 0 or prediction.shape[0] != count:
        raise EvaluationError(
            f"predictions: {name!r} has the shape {tuple(prediction.shape)} for {count} samples; each sample needs one row. A "
            "model must keep the batch in the first dimension, and data.collate (or the data set's __getitems__) every sample"
        )
    if prediction.is_complex():
        raise EvaluationError(
            f"predictions: {name!r} is {dtype_name(prediction.dtype)}, which no file format holds; an objective's "
            "'predicted' can return its real parts"
        )
    values = full_precision(prediction.detach()).cpu().numpy()
    return values[:, 0] if values.ndim == 2 and values.shape[1] == 1 else values


def _plain(values: Any) -> Values:
    """Return numbers as an array, strings as a list."""
    listed: Values = values.tolist() if values.dtype == object else np.ascontiguousarray(values)
    return listed
