"""Builds the data sets of a run: each once, with preprocessing fitted on the training samples only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from runtime.build.component import Component
from runtime.build.orders import ValueReader
from runtime.build.readers import name_of, with_shared_arguments
from runtime.config.data import DataSection, SplitSection
from runtime.config.sections import PredictionSection
from runtime.data.class_names import class_names
from runtime.data.fields import Name
from runtime.data.hugging_face import adapted
from runtime.data.samples import check_samples
from runtime.data.splitting import REST, Subset, split_ids, subset
from runtime.errors import DataError
from runtime.randomness import Purpose, derive, preserved_random_state, seed_everything

SPLITS = ("train", "validation", "test", "predict")
_CPU = torch.device("cpu")


def split_key(name: str) -> tuple[str, str]:
    """Return the key of a split's section."""
    return ("prediction", "data") if name == "predict" else ("data", name)


def split_section(name: str, data: DataSection, prediction: PredictionSection) -> SplitSection | None:
    """Return a split's section, or None if it has none, like held-out data."""
    split: SplitSection | None = prediction.data if name == "predict" else getattr(data, name)
    return split


def available_splits(data: DataSection, prediction: PredictionSection) -> list[str]:
    """Return the configured splits, with a section or held out."""
    return [
        name
        for name in SPLITS
        if split_section(name, data, prediction) is not None or getattr(data.split, name, None) is not None
    ]


class DataSources:
    """The data sets of one configuration.

    Args:
        data: section.
        readers: components of the data sets that have a section, by split.
        values: reads the values for ``data.split``.
        target: the part of a batch that is the target of metrics and predictions.
        stored: a checkpoint's :attr:`preparation`, in place of the training data.
    """

    def __init__(
        self,
        data: DataSection,
        readers: Mapping[str, Component],
        values: ValueReader,
        *,
        seed: int,
        target: Name | Sequence[Name] | None,
        stored: Mapping[str, Any] | None = None,
    ) -> None:
        self._data, self._values, self._seed, self._target = data, values, seed, target
        self._stored = dict(stored or {})
        self._readers = readers
        self._built: dict[str, Any] = {}

    def get(self, name: str) -> Any:
        """Return the data set of one of ``SPLITS``, or None if it is not configured.

        A data set with ``fit(ids)`` is fitted on the training samples; data sets of the same type in other splits get its
        state by ``adopt(fitted)``. So no preprocessing is fitted on held-out samples.

        Raises:
            ConfigurationError: the data set cannot be built.
            DataError: it is empty or not a data set, or the split is not possible.
        """
        if name not in self._built:
            self._built |= self._build(name)
        return self._built[name]

    @property
    def preparation(self) -> Mapping[str, Any]:
        """Preprocessing state and class names of the training data, JSON-serializable; each entry may be None.

        Saved in every checkpoint, so that later evaluation and prediction need no training data. ``fitted``: state fitted on
        the training rows; ``reader``: its reader's name; ``classes``: class names; ``target_scale``: mean and standard
        deviation of each standardised target.
        """
        if self._stored:
            return self._stored
        training = self.get(REST)
        reader = training.source if isinstance(training, Subset) else training
        return {
            "fitted": reader.fitted if hasattr(reader, "adopt") else None,
            "reader": name_of(reader),
            "classes": class_names(training, self._target),
            "target_scale": getattr(reader, "target_scale", None),
        }

    def _build(self, name: str) -> dict[str, Any]:
        reader = self._readers.get(name)
        if name == REST or (reader is None and getattr(self._data.split, name, None) is not None):
            return self._build_training()
        if reader is None:
            return {name: None}
        if name == "predict":
            reader = with_shared_arguments(reader, self._readers[REST], self._stored)
        source = self._checked(name, reader)
        if hasattr(source, "adopt") and not getattr(source, "prepared", False):
            prepared = self.preparation
            if prepared["reader"] == name_of(source) and prepared["fitted"] is not None:
                source.adopt(prepared["fitted"])
        if name != "predict":
            self._check_classes(name, source)
        return {name: source}

    def _check_classes(self, name: str, source: Any) -> None:
        """Refuse evaluation data whose class indices differ from those in training: each metric would be wrong."""
        evaluated = class_names(source, self._target)
        trained = self.preparation["classes"] if evaluated is not None else None
        if evaluated is None or trained is None or evaluated == trained:
            return
        index = next((n for n, pair in enumerate(zip(evaluated, trained, strict=False)) if pair[0] != pair[1]), None)
        if index is None and len(evaluated) < len(trained):
            return  # the first classes of training, with the same indices
        key = ".".join(split_key(name))
        if index is None:
            raise DataError(
                f"{key} has {len(evaluated)} classes and data.train {len(trained)}: data.train lacks "
                f"{evaluated[len(trained)]!r}"
            )
        raise DataError(
            f"{key}: class {index} is {evaluated[index]!r}, but {trained[index]!r} in data.train; metrics compare class "
            "indices, so give both the same classes in the same order"
        )

    def _build_training(self) -> dict[str, Any]:
        """Build the training data, and the parts held out of it."""
        data, split = self._data, self._data.split
        source = self._checked(REST, self._readers[REST])
        if data.train.sharded_by is not None:
            if split is not None:
                what = "a stream cannot be split: its length is unknown; give data.validation and data.test"
                raise self._values.where.error(("data", "split"), what)
            return {REST: source}
        parts = {REST: np.arange(len(source), dtype=np.int64)} if hasattr(source, "fit") else {}
        if split is not None:
            values_by_key = {
                key: self._values.read(("data", "split", key), values, source, numbers=False)
                for key in ("stratify", "group")
                if (values := getattr(split, key)) is not None
            }
            held_out = {name: share for name in ("validation", "test") if (share := getattr(split, name)) is not None}
            try:
                parts = split_ids(len(source), held_out, seed=split.seed, **values_by_key)
            except DataError as error:
                raise DataError(f"data.split: {error}") from error
        stored = self._stored
        if stored.get("fitted") is not None and stored["reader"] == name_of(source):
            source.adopt(stored["fitted"])
        elif hasattr(source, "fit"):
            source.fit(parts[REST])
        return {name: subset(source, ids) for name, ids in parts.items()} if split is not None else {REST: source}

    def _checked(self, name: str, reader: Component) -> Any:
        with preserved_random_state(_CPU):
            # Each rank builds its own copy; what its constructor draws (such as a random split) must be equal.
            seed_everything(derive(self._seed, Purpose.INITIALIZATION, 1), _CPU)
            source = reader.build()
        source = adapted(source, ".".join(split_key(name)))
        check_samples(source, ".".join(split_key(name)), sharded_by=reader.section.sharded_by)
        return source
