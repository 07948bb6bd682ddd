"""What a file of predictions holds: from the model's output to named columns, one row a sample."""

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
"""One value a sample: numbers, or a list of texts or numbers."""
Columns = dict[str, Values]
"""Name to values, in the order of the file."""

_OF_CLASSES = ("class", "probability", "probabilities")
_DERIVED = ("class", "prediction", "probability", "top_classes", "top_probabilities")


class ColumnBuilder:
    """Makes the columns that the configuration asks for.

    Args:
        section: what is asked for.
        wanted: name in the file to what it holds; empty for the default.
        problem: makes a problem of a key and what is wrong with it.
        names: what the data calls its classes, or several targets; they name predictions where the configuration has no labels
            and the model tells as many classes apart, or else gives as many numbers.
        scale: mean and deviation of each target that is standardised; ``prediction`` is in the targets' own units.
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

    def follows_places(self, fields: Fields) -> bool:
        """Tell whether something is written by a sample's place in the data set, not by what its batch says."""
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
            predictions: what the objective makes of the output, one row a sample.
            ids: what the samples are called.
            index: their places in the data set.
            part_of_data: returns a part of the data by its name.

        Raises:
            ConfigurationError: a column asks for what there is not.
            EvaluationError: the model's output has not one row for each sample.
        """
        found = {name: _rows(name, tensor, len(index)) for name, tensor in predictions.items()}
        self._check_labels(found)
        wanted = self._wanted or {
            "id": "id",
            "prediction": "prediction",
            **({"probability": "probability"} if {"probability", "probabilities"} & set(found) else {}),
        }
        columns: Columns = {}
        for name, kind in wanted.items():
            values = {"id": ids, "index": index}.get(kind)
            if kind.startswith(COLUMN) and part_of_data is not None:
                try:
                    values = part_of_data(kind.removeprefix(COLUMN))
                except DataError as error:
                    raise self._wrong(name, str(error)) from error
            more = {name: values} if values is not None else self._named(name, kind, self._of(name, kind, found), found)
            if twice := columns.keys() & more.keys():
                raise self._wrong(name, f"makes a second column {min(twice)!r}")
            columns |= more
        return columns

    def _of(self, name: str, kind: str, found: Mapping[str, Any]) -> Any:
        """Return what a column holds: what the objective gives, or what follows from its probabilities."""
        many, single = found.get("probabilities"), found.get("probability")
        if kind in found:
            return found[kind]
        if kind == "prediction":
            classes = self._class(found)
            if classes is None:
                return self._in_units(found.get("output", next(iter(found.values()))))
            named = self._labels and (many is not None or classes.ndim == 1)
            return np.array(self._labels, dtype=object)[classes] if named else classes
        if kind == "class" and (classes := self._class(found)) is not None:
            return classes
        if kind == "probability" and many is not None:
            return many.max(-1)
        if kind in ("top_classes", "top_probabilities") and many is not None:
            return self._best(many, as_classes=kind == "top_classes")
        possible = ["id", "index", "prediction", *found]
        possible += [
            k for k in _DERIVED if k not in possible and (many is not None or (k == "class" and single is not None))
        ]
        known = did_you_mean(kind, possible) or f"; known here: {', '.join(possible)}"
        raise self._wrong(name, f"holds {kind!r}, which the objective does not give{known}")

    def _in_units(self, values: Any) -> Any:
        """Undo the standardisation of the targets."""
        width = 1 if values.ndim == 1 else values.shape[-1]
        if self._scale is None or width != len(self._scale):
            return values
        mean, std = (np.array([of_target[key] for of_target in self._scale]) for key in ("mean", "std"))
        return (values.astype(np.float64) * std + mean).astype(values.dtype)

    def _class(self, found: Mapping[str, Any]) -> Any:
        if "class" in found:
            return found["class"]
        if "probabilities" in found:
            return found["probabilities"].argmax(-1)
        # Above one half, as torchmetrics judges by default.
        return (found["probability"] > 0.5).astype(np.int64) if "probability" in found else None

    def _best(self, probabilities: Any, *, as_classes: bool) -> Any:
        best = np.argsort(-probabilities, axis=-1, kind="stable")[..., : self._top_k]
        if not as_classes:
            return np.take_along_axis(probabilities, best, -1)
        return np.array(self._labels, dtype=object)[best] if self._labels else best

    def _named(self, name: str, kind: str, values: Any, found: Mapping[str, Any]) -> Columns:
        if values.ndim == 1:
            return {name: _plain(values)}
        if values.ndim > 2:
            raise self._wrong(
                name,
                f"needs one number a sample or one row of them; {kind!r} has the shape {tuple(values.shape[1:])} for each; "
                "an objective of your own can choose what to write (predictions)",
            )
        width = values.shape[1]
        parts: Sequence[Any] = range(1, width + 1) if kind.startswith("top_") else range(width)
        if self._labels and width == len(self._labels) and self._by_class(kind, found):
            parts = self._labels
        elif width == len(self._names) and kind in ("output", "prediction") and not {*_OF_CLASSES} & set(found):
            parts = self._names
        pattern = name if "{}" in name else f"{name}_{{}}"
        return {pattern.replace("{}", str(part)): _plain(values[:, i]) for i, part in enumerate(parts)}

    def _by_class(self, kind: str, found: Mapping[str, Any]) -> bool:
        """Tell whether the numbers of a row belong to the classes, in their order."""
        if "probabilities" in found:
            return kind in ("probabilities", "output")
        several_labels = "probability" in found and found["probability"].ndim > 1
        return several_labels and kind in ("probability", "output", "class", "prediction")

    def _check_labels(self, found: Mapping[str, Any]) -> None:
        if not self._labels or self._labels is self._names:
            self._labels = self._names if len(self._names) == _num_classes(found) else []
            return
        classes = _num_classes(found)
        if classes is None and "class" in found:
            most = int(found["class"].max(initial=0))
            classes = most + 1 if most >= len(self._labels) else len(self._labels)
        if classes is None:
            what = "there are no classes to name: the objective gives no probabilities; leave 'labels' out"
            raise ConfigurationError([self._problem(("prediction", "labels"), what)])
        if classes != len(self._labels):
            what = f"{len(self._labels)} labels for {classes} classes"
            raise ConfigurationError([self._problem(("prediction", "labels"), what)])

    def _wrong(self, name: str, what: str) -> ConfigurationError:
        key = ("prediction", "columns", name) if name in self._wanted else ("prediction", "columns")
        return ConfigurationError([self._problem(key, what)])


def _labels_of(names: Sequence[str]) -> list[str | int]:
    """Return names of classes as what they are in the data: whole numbers, if all of them are."""
    whole = all(name.removeprefix("-").isdecimal() and str(int(name)) == name for name in names)
    return [int(name) for name in names] if whole else list(names)


def _num_classes(found: Mapping[str, Any]) -> int | None:
    """Return how many classes (or labels) probabilities tell apart; None if there are none."""
    if "probabilities" in found:
        return int(found["probabilities"].shape[-1])
    if "probability" in found:
        return int(found["probability"].shape[1]) if found["probability"].ndim > 1 else 2
    return None


def model_arguments(fields: Fields, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return what the model is called with, of a batch that may have no target.

    Raises:
        ObjectiveError: nothing says which part is the model's.
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


def one_each(values: Any, count: int, what: str, *, may_lack: bool = False) -> Values:
    """Return a part of a batch as one text or number for each sample.

    Args:
        may_lack: a sample may have none.

    Raises:
        DataError: it is something else.
    """
    if isinstance(values, Tensor):
        values = full_precision(values).cpu().numpy()
    listed = isinstance(values, np.ndarray | list | tuple) and np.ndim(values) == 1
    if listed and len(values) != count:
        raise DataError(
            f"{what} is there {len(values)} times for {count} samples; data.collate (or the data set's __getitems__) must keep "
            "every sample that is predicted"
        )
    if not listed or not all(isinstance(v, str | int | float | np.generic) or (may_lack and v is None) for v in values):
        raise DataError(f"{what} must be one text or number for each of {count} samples")
    if isinstance(values, np.ndarray) and values.dtype.kind in "iuf":
        return values
    return [value.item() if isinstance(value, np.generic) else value for value in values]


class DataColumns:
    """Reads ids and other parts of the data that are written beside the predictions: of the batch, else of the data set.

    A data set has columns where it has ``as_written(name)``, which returns them as they stand in its file, or ``column(name)``.

    Args:
        source: the data set.
    """

    def __init__(self, source: Any) -> None:
        self._source = source
        self._columns: dict[str, Any] = {}

    def has_column(self, name: str) -> bool:
        """Tell whether the data set has a column of a name."""
        try:
            return self._column(name) is not None
        except DataError:
            return False

    def ids(self, batch: Any, index: Values, name: Name | None) -> Values:
        """Return what the samples of a batch are called: that part, or their places in the data set if there is none.

        Raises:
            DataError: there is no such part, or it is not one text or number for each sample.
        """
        if name is None:
            return index
        try:
            found = self._part(batch, index, name)
        except DataError as error:
            raise DataError(f"data.fields.id: {error}") from error
        return one_each(found, len(index), f"data.fields.id: {name!r}")

    def of(self, batch: Any, index: Any, name: str) -> Values:
        """Return one text or number for each sample of a batch; a sample may have none.

        Raises:
            DataError: there is no such part, or it is something else.
        """
        place: Name = int(name) if name.isdecimal() and isinstance(batch, list | tuple) else name
        found = self._part(batch, index, place)
        return one_each(found, len(index), f"column {name!r} of the data", may_lack=True)

    def _part(self, batch: Any, index: Any, name: Name) -> Any:
        single = isinstance(batch, Tensor)  # whose parts would be its rows
        try:
            if not single:
                return part_of(batch, name)
            why = f"the batch is {describe(batch)}"
        except ObjectiveError as error:
            why = str(error).partition(": ")[2]
        column = self._column(name) if isinstance(name, str) else None
        if column is None:
            raise DataError(f"the data has no part {name!r}: {why}, and the data set has no method column(name)")
        return column[index]

    def _column(self, name: str) -> Any:
        """Return a column of the data set, or None if it has no columns at all."""
        if name not in self._columns:
            ids = getattr(self._source, "ids", None)
            whole = self._source if ids is None else self._source.source
            read = getattr(whole, "as_written", None) or getattr(whole, "column", None)
            found = None if read is None else _read(whole, read, name)
            self._columns[name] = found if ids is None or found is None else found[ids]
        return self._columns[name]


def _read(source: Any, read: Callable[[str], Any], name: str) -> Any:
    """Return a column by a method that may be the user's."""
    try:
        found = np.asarray(read(name))
    except LockstepError:
        raise
    except Exception as error:
        raise DataError(f"{type(source).__name__}.{read.__name__}({name!r}) raised {described(error)}") from error
    if found.shape[:1] != (len(source),):
        raise DataError(
            f"{type(source).__name__}.{read.__name__}({name!r}) has the shape {found.shape} for {len(source)} samples"
        )
    return found


def _rows(name: str, given: Any, count: int) -> Any:
    if not isinstance(given, Tensor):
        raise EvaluationError(
            f"predictions: {name!r} is a {type(given).__name__}, not a tensor; say which part of what the model returns is "
            "its output (model.output)"
        )
    if given.ndim == 0 or given.shape[0] != count:
        raise EvaluationError(
            f"predictions: {name!r} has the shape {tuple(given.shape)} for {count} samples; each sample needs one row. A model "
            "must keep the batch in the first dimension, and data.collate (or the data set's __getitems__) every sample"
        )
    if given.is_complex():
        raise EvaluationError(
            f"predictions: {name!r} is {dtype_name(given.dtype)}, which no file holds; an objective's 'predicted' can give "
            "parts"
        )
    values = full_precision(given.detach()).cpu().numpy()
    return values[:, 0] if values.ndim == 2 and values.shape[1] == 1 else values


def _plain(values: Any) -> Values:
    """Return numbers as an array, texts as a list."""
    listed: Values = values.tolist() if values.dtype == object else np.ascontiguousarray(values)
    return listed
