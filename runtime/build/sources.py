"""The data sets of a run: each is built once, and prepared by the training samples alone."""

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
    """Return a split's section, or None where the configuration has none; data that is held out has none."""
    split: SplitSection | None = prediction.data if name == "predict" else getattr(data, name)
    return split


def available_splits(data: DataSection, prediction: PredictionSection) -> list[str]:
    """Return the splits that there are, of their own or held out."""
    return [
        name
        for name in SPLITS
        if split_section(name, data, prediction) is not None or getattr(data.split, name, None) is not None
    ]


class DataSources:
    """The data sets of one configuration.

    Args:
        data: section.
        readers: what makes the data sets that have a section, by split.
        values: reads values that a split follows from.
        target: the part of a batch that metrics and predictions are about.
        stored: what :attr:`preparation` was when a checkpoint was made, in place of the training data.
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
        """Return the data set of one of ``SPLITS``, or None where the configuration has none.

        What prepares itself by the training samples (``fit(ids)``) is given them; what another part was fitted with
        (``fitted``) is handed to a data set of the same type (``adopt(fitted)``). So no part is prepared by what it holds
        out.

        Raises:
            ConfigurationError: the data set cannot be built.
            DataError: it is empty or no data set, or there is no such split.
        """
        if name not in self._built:
            self._built |= self._build(name)
        return self._built[name]

    @property
    def preparation(self) -> Mapping[str, Any]:
        """What the training data says about preparing data and naming classes, as JSON can hold it; each may be None.

        It is in every checkpoint, so that what is evaluated or predicted later needs no training data: ``fitted``, what a
        reader took from the training rows; ``reader``, which one that was; ``classes``, the names; ``target_scale``, mean and
        deviation of each target that is standardised.
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
        """Refuse evaluation data whose classes have other numbers than in training: each metric would be wrong."""
        own = class_names(source, self._target)
        trained = self.preparation["classes"] if own is not None else None
        if own is None or trained is None or own == trained:
            return
        place = next((n for n, pair in enumerate(zip(own, trained, strict=False)) if pair[0] != pair[1]), None)
        if place is None and len(own) < len(trained):
            return  # the first of them, with their numbers
        key = ".".join(split_key(name))
        if place is None:
            raise DataError(
                f"{key} has {len(own)} classes and data.train {len(trained)}: {own[len(trained)]!r} is none of training's"
            )
        raise DataError(
            f"{key}: class {place} is {own[place]!r}, and {trained[place]!r} in data.train; metrics compare the numbers, so "
            "give both the same classes in the same order"
        )

    def _build_training(self) -> dict[str, Any]:
        """Build the training data, and what is held out of it."""
        data, split = self._data, self._data.split
        source = self._checked(REST, self._readers[REST])
        if data.train.sharded_by is not None:
            if split is not None:
                what = "a stream cannot be split: nobody knows its length; give data.validation and data.test"
                raise self._values.where.error(("data", "split"), what)
            return {REST: source}
        parts = {REST: np.arange(len(source), dtype=np.int64)} if hasattr(source, "fit") else {}
        if split is not None:
            of = {
                key: self._values.read(("data", "split", key), values, source, numbers=False)
                for key in ("stratify", "group")
                if (values := getattr(split, key)) is not None
            }
            held_out = {name: share for name in ("validation", "test") if (share := getattr(split, name)) is not None}
            try:
                parts = split_ids(len(source), held_out, seed=split.seed, **of)
            except DataError as error:
                raise DataError(f"data.split: {error}") from error
        known = self._stored
        if known.get("fitted") is not None and known["reader"] == name_of(source):
            source.adopt(known["fitted"])
        elif hasattr(source, "fit"):
            source.fit(parts[REST])
        return {name: subset(source, ids) for name, ids in parts.items()} if split is not None else {REST: source}

    def _checked(self, name: str, reader: Component) -> Any:
        with preserved_random_state(_CPU):
            # Ranks build their own copies; whatever these draw (a random split, say) must be equal.
            seed_everything(derive(self._seed, Purpose.INITIALIZATION, 1), _CPU)
            source = reader.build()
        source = adapted(source, ".".join(split_key(name)))
        check_samples(source, ".".join(split_key(name)), sharded_by=reader.section.sharded_by)
        return source
