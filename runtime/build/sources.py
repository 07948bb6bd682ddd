"""The data sets of a run, and the orders that follow from a value of each of their samples."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from runtime.build import resolver
from runtime.config import component
from runtime.config.data import Data, SampleValues, Split
from runtime.config.file import LoadedConfiguration
from runtime.config.types import ComponentSection
from runtime.data.batching import BalancedOrder, BudgetOrder, LengthGroupedOrder
from runtime.data.class_names import class_names
from runtime.data.fields import Name
from runtime.data.hugging_face import adapted
from runtime.data.order import IndexOrder, Order, SamplerOrder, WeightedOrder
from runtime.data.sample_values import Values, values_of
from runtime.data.samples import check_samples
from runtime.data.splitting import REST, Subset, split_ids, subset
from runtime.errors import ConfigurationError, DataError
from runtime.randomness import Purpose, derive, preserved_random_state, seed_everything

NAMESPACES = ("runtime.data_sources",)
SAMPLERS = ("torch.utils.data",)
SPLITS = ("train", "validation", "test", "predict")
_CPU = torch.device("cpu")


def split_key(name: str) -> tuple[str, str]:
    """Return the key of a split's section."""
    return ("prediction", "data") if name == "predict" else ("data", name)


def split_section(loaded: LoadedConfiguration, name: str) -> Split | None:
    """Return a split's section, or None where the configuration has none; data that is held out has none."""
    section, key = split_key(name)
    split: Split | None = getattr(getattr(loaded.values, section), key)
    return split


def has_split(loaded: LoadedConfiguration, name: str) -> bool:
    """Tell whether there is such data, of its own or held out."""
    return split_section(loaded, name) is not None or getattr(loaded.values.data.split, name, None) is not None


def build_source(loaded: LoadedConfiguration, name: str) -> Any:
    """Build the data set of one of ``SPLITS``, or return None where the configuration has none.

    What prepares itself by the training samples (``fit(ids)``) is given them; what another part was fitted with
    (``fitted``) is handed to a data set of the same type (``adopt(fitted)``). So no part is prepared by what it holds out.
    Each is built once for a configuration.

    Raises:
        ConfigurationError: the data set cannot be built.
        DataError: it is empty or no data set, or there is no such split.
    """
    if name not in loaded.sources:
        loaded.sources.update(_built(loaded, name))
    return loaded.sources[name]


def preparation(loaded: LoadedConfiguration) -> dict[str, Any]:
    """Return what the training data says about preparing data and naming classes, as JSON can hold it; each may be None.

    It is in every checkpoint, so that what is evaluated or predicted later needs no training data: ``fitted``, what a reader
    took from the training rows; ``reader``, which one that was; ``classes``, the names; ``target_scale``, mean and deviation
    of each target that is standardised.
    """
    if loaded.preparation:
        return loaded.preparation
    training = build_source(loaded, REST)
    reader = _whole(training)
    return {
        "fitted": reader.fitted if hasattr(reader, "adopt") else None,
        "reader": _name_of(reader),
        "classes": class_names(training, target_part(loaded)),
        "target_scale": getattr(reader, "target_scale", None),
    }


def target_part(loaded: LoadedConfiguration) -> Name | Sequence[Name] | None:
    """Return the part of a batch that metrics and predictions are about: the first loss's target."""
    first = next(iter(loaded.values.objective.losses.values()), None)
    own = first.fields.target if first is not None else None
    return loaded.values.data.fields.target if own is None else own


def completed_section(loaded: LoadedConfiguration, name: str) -> Split | None:
    """Return a split's section; of what is to be predicted, with the arguments that its reader shares with the training data.

    A reader names these in ``shared_arguments``. Those that follow from what was fitted are what ``arguments_of(fitted)``
    returns. Arguments that are given come first.
    """
    section, training = split_section(loaded, name), loaded.values.data.train
    if name != "predict" or section is None or section.target != training.target:
        return section
    try:
        found = component.locate(section.target, namespaces=NAMESPACES, code=loaded.code)
    except component.ComponentError:
        return section  # told where it is checked
    shared = {name: training.args[name] for name in getattr(found, "shared_arguments", ()) if name in training.args}
    fitted = loaded.preparation.get("fitted") if loaded.preparation.get("reader") == _name_of(found) else None
    if fitted is not None and hasattr(found, "arguments_of"):
        shared |= found.arguments_of(fitted)
    return section.model_copy(update={"args": {**shared, **section.args}})


def lacking_arguments(loaded: LoadedConfiguration, name: str) -> list[str]:
    """Return which of the training data's arguments a split's section leaves out though its reader prepares samples by them."""
    section, training = split_section(loaded, name), loaded.values.data.train
    if section is None or section.target != training.target:
        return []
    found = component.locate(section.target, namespaces=NAMESPACES, code=loaded.code)
    shared = getattr(found, "shared_arguments", ())
    return [argument for argument in shared if argument in training.args and argument not in section.args]


def _whole(source: Any) -> Any:
    return source.source if isinstance(source, Subset) else source


def _name_of(reader: Any) -> str:
    kind = reader if inspect.isclass(reader) else type(reader)
    return f"{kind.__module__}:{kind.__qualname__}"


def value_components(data: Data) -> Iterator[tuple[tuple[str, ...], ComponentSection]]:
    """Yield the components that compute one value for each sample, with their keys."""
    for section_name, key in (
        ("split", "stratify"),
        ("split", "group"),
        ("group_by_length", "lengths"),
        ("budget", "lengths"),
        ("balance", "classes"),
        ("weights", "values"),
    ):
        where = getattr(getattr(data, section_name), key, None)
        if isinstance(where, ComponentSection):
            yield ("data", section_name, key), where


def build_order(loaded: LoadedConfiguration, source: Any) -> Order:
    """Build the order of the training samples.

    Raises:
        ConfigurationError: the sampler cannot be built, or the values it follows from cannot be computed.
        DataError: there is not one fitting value for each sample, or a sample is above the budget.
    """
    values, data = loaded.values, loaded.values.data
    size = values.batch.global_size
    drawn = _order_by_values(loaded, source)
    if drawn is not None:
        return drawn
    section = data.sampler or data.batch_sampler
    if section is None:
        return IndexOrder(
            len(source), batch_size=size, seed=values.seed, shuffle=data.shuffle is not False, drop_last=data.drop_last
        )
    key = ("data", "sampler" if data.sampler else "batch_sampler")
    given = () if names_first_parameter(loaded, section) else (source,)
    sampler = resolver.build(loaded, key, section, *given, namespaces=SAMPLERS)
    return SamplerOrder(
        sampler,
        num_samples=len(source),
        batch_size=size if data.sampler else None,
        seed=values.seed,
        drop_last=data.drop_last,
    )


def names_first_parameter(loaded: LoadedConfiguration, section: ComponentSection) -> bool:
    """Tell whether a sampler's arguments name its first parameter, which is otherwise the data set."""
    found = component.locate(section.target, namespaces=SAMPLERS, code=loaded.code)
    first = next(iter(inspect.signature(found).parameters), None)
    return first in section.args


def _order_by_values(loaded: LoadedConfiguration, source: Any) -> Order | None:
    """Build the order that follows from a length, class or weight of each training sample, or None if none is asked for."""
    values, data, size = loaded.values, loaded.values.data, loaded.values.batch.global_size

    def of(section: str, key: str, where: SampleValues, *, numbers: bool = True) -> Values:
        return _values(loaded, ("data", section, key), where, source, numbers=numbers)

    if data.group_by_length is not None:
        return LengthGroupedOrder(
            of("group_by_length", "lengths", data.group_by_length.lengths),
            batch_size=size,
            seed=values.seed,
            drop_last=data.drop_last,
            stretch_batches=data.group_by_length.stretch_batches,
        )
    if data.budget is not None:
        return BudgetOrder(
            of("budget", "lengths", data.budget.lengths),
            budget=data.budget.tokens,
            seed=values.seed,
            most_samples=size,
            padded=data.budget.padded,
            shuffle=data.shuffle is not False,
            stretch_batches=data.budget.stretch_batches,
        )
    if data.balance is not None:
        return BalancedOrder(
            of("balance", "classes", data.balance.classes, numbers=False),
            batch_size=size,
            seed=values.seed,
            num_samples=data.balance.num_samples,
            drop_last=data.drop_last,
        )
    if data.weights is not None:
        weights = of("weights", "values", data.weights.values)
        if not weights.any():
            raise ConfigurationError([loaded.problem(("data", "weights", "values"), "all weights are 0")])
        return WeightedOrder(
            weights,
            num_draws=data.weights.num_samples,
            batch_size=size,
            seed=values.seed,
            drop_last=data.drop_last,
        )
    return None


def _built(loaded: LoadedConfiguration, name: str) -> dict[str, Any]:
    section = completed_section(loaded, name)
    if name == REST or (section is None and has_split(loaded, name)):
        return _training(loaded)
    if section is None:
        return {name: None}
    source = _checked(loaded, name, section)
    if hasattr(source, "adopt") and not getattr(source, "prepared", False):
        prepared = preparation(loaded)
        if prepared["reader"] == _name_of(source) and prepared["fitted"] is not None:
            source.adopt(prepared["fitted"])
    if name != "predict":
        _check_classes(loaded, name, source)
    return {name: source}


def _check_classes(loaded: LoadedConfiguration, name: str, source: Any) -> None:
    """Refuse evaluation data whose classes have other numbers than in training: each metric would be wrong."""
    own = class_names(source, target_part(loaded))
    trained = preparation(loaded)["classes"] if own is not None else None
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


def _training(loaded: LoadedConfiguration) -> dict[str, Any]:
    """Build the training data, and what is held out of it."""
    data = loaded.values.data
    source = _checked(loaded, REST, data.train)
    if data.train.sharded_by is not None:
        if data.split is not None:
            what = "a stream cannot be split: nobody knows its length; give data.validation and data.test"
            raise ConfigurationError([loaded.problem(("data", "split"), what)])
        return {REST: source}
    parts = {REST: np.arange(len(source), dtype=np.int64)} if hasattr(source, "fit") else {}
    split = data.split
    if split is not None:
        of = {
            key: _values(loaded, ("data", "split", key), where, source, numbers=False)
            for key in ("stratify", "group")
            if (where := getattr(split, key)) is not None
        }
        held_out = {name: share for name in ("validation", "test") if (share := getattr(split, name)) is not None}
        try:
            parts = split_ids(len(source), held_out, seed=split.seed, **of)
        except DataError as error:
            raise DataError(f"data.split: {error}") from error
    known = loaded.preparation
    if known.get("fitted") is not None and known["reader"] == _name_of(source):
        source.adopt(known["fitted"])
    elif hasattr(source, "fit"):
        source.fit(parts[REST])
    return {name: subset(source, ids) for name, ids in parts.items()} if split is not None else {REST: source}


def _checked(loaded: LoadedConfiguration, name: str, section: Split) -> Any:
    with preserved_random_state(_CPU):
        # Ranks build their own copies; whatever these draw (a random split, say) must be equal.
        seed_everything(derive(loaded.values.seed, Purpose.INITIALIZATION, 1), _CPU)
        source = resolver.build(loaded, split_key(name), section, namespaces=NAMESPACES)
    source = adapted(source, ".".join(split_key(name)))
    check_samples(source, ".".join(split_key(name)), sharded_by=section.sharded_by)
    return source


def _values(
    loaded: LoadedConfiguration, key: tuple[str, ...], where: SampleValues, source: Any, *, numbers: bool
) -> Values:
    found = resolver.function(loaded, key, where) if isinstance(where, ComponentSection) else where
    try:
        return values_of(source, found, ".".join(key), numbers=numbers)
    except DataError as error:
        raise ConfigurationError([loaded.problem(key, str(error).removeprefix(".".join(key) + ": "))]) from error
