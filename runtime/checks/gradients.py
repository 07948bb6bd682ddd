"""Detect parameters that get no gradient from a backward pass; reported at the start, with the key to change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from runtime.build.preparation import RunComponents
from runtime.checks.traces import left_as_it_was
from runtime.config.locations import Locations
from runtime.data.loading import MakeLoader, read
from runtime.data.samples import SlotIndex
from runtime.data.training_data import MappedData, TrainingData
from runtime.errors import LockstepError
from runtime.randomness import Purpose, derive, preserved_random_state, seed_everything
from runtime.strategies import Strategy
from runtime.strategies.reduction import listed


def check_gradients(
    strategy: Strategy,
    prepared: RunComponents,
    make_loader: MakeLoader,
    *,
    seed: int,
    where: Locations,
    warn: Callable[[str], None],
) -> None:
    """Run the first slot's samples forward and backward on every rank; report parameters without a gradient. Collective.

    Raises:
        ConfigurationError: the ranks' gradients could not be summed.
    """
    batch = first_slot(prepared.data, make_loader, slots=prepared.assignment.slots)
    if batch is None:
        return
    with preserved_random_state(strategy.device), left_as_it_was(strategy.unwrapped, training=True):
        seed_everything(derive(seed, Purpose.SLOT, 0, 0), strategy.device)
        try:
            unused = strategy.unused_parameters(batch)
        except Exception as error:
            if not strategy.state_io.held_whole or isinstance(error, LockstepError):
                raise
            return  # the first step reports the error
    if unused is None:
        return
    found = f"{listed(unused.names)} got no gradient from the first samples"
    if unused.refused_key is not None:
        raise where.error(unused.refused_key, f"is false, and {found}: {unused.remedy}")
    warn(f"model: {found}{unused.remedy}")


def first_slot(data: TrainingData, make_loader: MakeLoader, *, slots: int) -> Any:
    """Read the samples of the run's first slot; None for a stream, where what is read may be lost."""
    if not isinstance(data, MappedData):
        return None
    ids = data.order.batch(0, 0)
    ids = ids[: max(1, len(ids) // slots)]
    return next(iter(read(data.samples, iter([SlotIndex(0, ids)]), make_loader)))
