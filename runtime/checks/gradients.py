"""Detect parameters that get no gradient from a backward pass; reported at the start, with the key to change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from runtime.build.preparation import RunComponents
from runtime.checks.traces import left_as_it_was
from runtime.config.locations import Locations
from runtime.config.strategy import StrategySection
from runtime.config.zero_rules import UNUSED_PARAMETERS
from runtime.data.loading import MakeLoader, read
from runtime.data.samples import SlotIndex
from runtime.data.training_data import MappedData, TrainingData
from runtime.errors import LockstepError
from runtime.randomness import Purpose, derive, preserved_random_state, seed_everything
from runtime.strategies import Strategy
from runtime.strategies.reduction import listed


def check_gradients(
    section: StrategySection,
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
            names = strategy.without_gradient(batch)
        except Exception as error:
            if strategy.sharded or isinstance(error, LockstepError):
                raise
            return  # the first step reports the error
    options = section.ddp
    if not names or (section.kind == "ddp" and options.find_unused_parameters):
        return
    found = f"{listed(names)} got no gradient from the first samples"
    if section.kind == "zero":
        warn(f"model: {found}; {UNUSED_PARAMETERS}")
    elif section.kind == "ddp" and strategy.world_size > 1 and not options.static_graph:
        what = (
            f"is false, and {found}: the ranks' gradients cannot be summed then. Set it to true if other steps use them; "
            "freeze what no step uses (model.freeze), or leave it out of the model"
        )
        raise where.error(("strategy", "ddp", "find_unused_parameters"), what)
    else:
        several = "; several processes need strategy.ddp.find_unused_parameters: true" if section.kind == "ddp" else ""
        warn(
            f"model: {found}, so these do not train them; freeze what no step uses (model.freeze), or leave it out of the "
            f"model{several}"
        )


def first_slot(data: TrainingData, make_loader: MakeLoader, *, slots: int) -> Any:
    """Read the samples of the run's first slot; None for a stream, where what is read may be lost."""
    if not isinstance(data, MappedData):
        return None
    ids = data.order.batch(0, 0)
    ids = ids[: max(1, len(ids) // slots)]
    return next(iter(read(data.samples, iter([SlotIndex(0, ids)]), make_loader)))
