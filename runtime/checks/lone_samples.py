"""Detect slots with one sample, over which BatchNorm cannot normalise, before training reaches the epoch's last batch.

A batch of n samples is split into K slots as evenly as possible, so a batch of fewer than 2K samples has slots with a single
sample. BatchNorm over a vector, and InstanceNorm over one element, then raise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from runtime.build.preparation import RunComponents
from runtime.checks.traces import left_as_it_was
from runtime.config.data import DataSection
from runtime.config.locations import Locations
from runtime.data.loading import MakeLoader, read
from runtime.data.samples import SlotIndex
from runtime.data.training_data import MappedData
from runtime.randomness import preserved_random_state
from runtime.strategies import Strategy
from runtime.strategies.placement import to_device

_TORCH_MESSAGES = ("Expected more than 1 value per channel", "Expected more than 1 spatial element")


def check_lone_samples(
    section: DataSection,
    strategy: Strategy,
    prepared: RunComponents,
    make_loader: MakeLoader,
    *,
    batch_size: int,
    where: Locations,
    warn: Callable[[str], None],
) -> None:
    """Refuse slots of one sample if a layer cannot normalise over them; only warn for a stream, whose last batch is unknown.

    Raises:
        ConfigurationError: names the layer and the batch.
    """
    data, slots, size = prepared.data, prepared.assignment.slots, batch_size
    norms = _norms(strategy.unwrapped)
    if strategy.collective_forward:  # no trial: an aborted forward pass would leave parameters gathered
        norms = [(name, part) for name, part in norms if isinstance(part, nn.BatchNorm1d)]
    if not norms:
        return
    if not isinstance(data, MappedData):
        # A stream that yields batches chooses their sizes itself.
        if not section.drop_last and not data.samples.batches:
            warn(
                f"model: {norms[0][0]} normalises over the samples of a slot, and the stream's last batch may leave a slot "
                "with one: set data.drop_last: true"
            )
        return
    lone = next((n for n in (size, data.smallest_batch) if _smallest_slot(n, slots) == 1), None)
    if lone is None:
        return
    layer = norms[0][0] if strategy.collective_forward else _refusing_layer(strategy, data, make_loader)
    if layer is None:
        return
    what = (
        f"{layer} normalises over the samples of a slot, and {'each' if lone == size else 'the last'} global batch of an epoch "
        f"has {lone} samples for {slots} slots, so that some slot has a single one: "
    )
    if lone == size:
        what += f"use at most {max(1, size // 2)} slots (batch.slots, or a larger batch.micro_size), or a larger batch"
        raise where.error(("batch", "slots"), what)
    what += f"set it to true, or choose a batch.global_size with a remainder of 0 or at least {2 * slots}"
    if strategy.collective_forward:
        warn(f"data.drop_last: {what}")
        return
    raise where.error(("data", "drop_last"), what)


def _norms(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the layers that normalise over samples in training, by name, without frozen ones."""
    frozen = {id(part) for root in getattr(module, "frozen", ()) for part in root.modules()}
    return [
        (f"{name.removeprefix('model.')} ({type(part).__name__})", part)
        for name, part in module.named_modules()
        if isinstance(part, _BatchNorm | _InstanceNorm) and id(part) not in frozen
    ]


def _smallest_slot(samples: int, slots: int) -> int:
    return min(n for k in range(slots) if (n := samples * (k + 1) // slots - samples * k // slots))


def _refusing_layer(strategy: Strategy, data: MappedData, make_loader: MakeLoader) -> str | None:
    """Run one sample forward, and return the layer that raises, or None. Leaves all state unchanged."""
    batch = next(iter(read(data.samples, iter([SlotIndex(0, data.order.batch(0, 0)[:1])]), make_loader)))
    entered: list[str] = []
    hooks = [part.register_forward_pre_hook(_recorder(entered, name)) for name, part in _norms(strategy.unwrapped)]
    try:
        with (
            preserved_random_state(strategy.device),
            left_as_it_was(strategy.unwrapped, training=True),
            torch.no_grad(),
            strategy.autocast(),
        ):
            strategy.unwrapped(to_device(batch, strategy.device))
    except Exception as error:  # the first step reports other errors
        return entered[-1] if entered and any(message in str(error) for message in _TORCH_MESSAGES) else None
    finally:
        for hook in hooks:
            hook.remove()
    return None


def _recorder(entered: list[str], name: str) -> Callable[..., Any]:
    def record(part: nn.Module, arguments: Any) -> None:
        entered.append(name)

    return record
