"""Builds the order of the training samples: a permutation, a sampler, or one computed from a value of each sample."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from runtime.build.component import Component, call_mistakes
from runtime.config.component import ComponentError
from runtime.config.data import DataSection, SampleValues
from runtime.config.locations import Locations
from runtime.config.types import ComponentSection
from runtime.data.batching import BalancedOrder, BudgetOrder, LengthGroupedOrder
from runtime.data.order import IndexOrder, Order, SamplerOrder, WeightedOrder
from runtime.data.sample_values import Values, values_of
from runtime.errors import DataError


def sampler_mistakes(sampler: Component) -> list[ComponentError]:
    """Check a sampler, which gets the data set as its first argument unless the configuration sets that argument."""
    try:
        positional = 0 if _names_first_parameter(sampler) else 1
    except ComponentError as mistake:
        return [mistake]
    return call_mistakes(sampler, positional=positional)


@dataclass(frozen=True)
class ValueReader:
    """Reads or computes one value for each sample.

    Args:
        component: returns the component of a key, given as its parts.
        where: where each key was written.
    """

    component: Callable[..., Component]
    where: Locations

    def read(self, key: tuple[str, ...], values: SampleValues, source: Any, *, numbers: bool = True) -> Values:
        """Return the values for a key, one per sample.

        Raises:
            ConfigurationError: they cannot be read or computed, or there is not one for each sample.
        """
        origin = self.component(*key).function() if isinstance(values, ComponentSection) else values
        try:
            return values_of(source, origin, ".".join(key), numbers=numbers)
        except DataError as error:
            raise self.where.error(key, str(error).removeprefix(".".join(key) + ": ")) from error


def build_order(
    data: DataSection, source: Any, *, batch_size: int, seed: int, sampler: Component | None, reader: ValueReader
) -> Order:
    """Build the order of the training samples.

    Args:
        source: the data set.
        batch_size: samples of a global batch.
        sampler: of single samples or of batches, or None.

    Raises:
        ConfigurationError: the sampler cannot be built, or the values of the samples cannot be computed.
        DataError: there is not one valid value for each sample, or a sample is above the budget.
    """
    order = _order_by_values(data, source, batch_size=batch_size, seed=seed, reader=reader)
    if order is not None:
        return order
    if sampler is None:
        return IndexOrder(
            len(source), batch_size=batch_size, seed=seed, shuffle=data.shuffle is not False, drop_last=data.drop_last
        )
    positional = () if _names_first_parameter(sampler) else (source,)
    return SamplerOrder(
        sampler.build(*positional),
        num_samples=len(source),
        batch_size=batch_size if data.sampler else None,
        seed=seed,
        drop_last=data.drop_last,
    )


def _names_first_parameter(sampler: Component) -> bool:
    """Return whether the configuration sets a sampler's first parameter, which is otherwise the data set."""
    first = next(iter(inspect.signature(sampler.locate()).parameters), None)
    return first in sampler.args


def _order_by_values(
    data: DataSection, source: Any, *, batch_size: int, seed: int, reader: ValueReader
) -> Order | None:
    """Build the order by a length, class or weight of each training sample, or None if none is configured."""

    def of(section: str, key: str, values: SampleValues, *, numbers: bool = True) -> Values:
        return reader.read(("data", section, key), values, source, numbers=numbers)

    if data.group_by_length is not None:
        return LengthGroupedOrder(
            of("group_by_length", "lengths", data.group_by_length.lengths),
            batch_size=batch_size,
            seed=seed,
            drop_last=data.drop_last,
            stretch_batches=data.group_by_length.stretch_batches,
        )
    if data.budget is not None:
        return BudgetOrder(
            of("budget", "lengths", data.budget.lengths),
            budget=data.budget.tokens,
            seed=seed,
            max_samples=batch_size,
            padded=data.budget.padded,
            shuffle=data.shuffle is not False,
            stretch_batches=data.budget.stretch_batches,
        )
    if data.balance is not None:
        return BalancedOrder(
            of("balance", "classes", data.balance.classes, numbers=False),
            batch_size=batch_size,
            seed=seed,
            num_samples=data.balance.num_samples,
            drop_last=data.drop_last,
        )
    if data.weights is not None:
        weights = of("weights", "values", data.weights.values)
        if not weights.any():
            raise reader.where.error(("data", "weights", "values"), "all weights are 0")
        return WeightedOrder(
            weights,
            num_draws=data.weights.num_samples,
            batch_size=batch_size,
            seed=seed,
            drop_last=data.drop_last,
        )
    return None
