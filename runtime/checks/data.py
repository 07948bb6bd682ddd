"""Whether data and samplers give the same when they are asked again, on every rank."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from runtime.build.component import Component
from runtime.build.data_contents import does_not_repeat
from runtime.build.preparation import RunComponents
from runtime.build.sources import split_key
from runtime.data.order import SamplerOrder
from runtime.data.probing import GLOBAL_RNGS
from runtime.data.training_data import MappedData
from runtime.distributed.collectives import gather_bytes
from runtime.strategies import Strategy


def check_samples_repeat(strategy: Strategy, prepared: RunComponents, warn: Callable[[str], None]) -> bool:
    """Warn of data sets, transforms and collate functions that give something else when a sample is read again. Collective.

    Returns:
        whether training samples give the same on every rank.
    """
    contents = prepared.contents
    for part, differing in contents.differing.items():
        warn(does_not_repeat(part, differing))
    for part, fault in contents.memory.items():
        warn(f"{'.'.join(split_key(part))}: {fault}")
    if contents.state_fault:
        warn(
            f"data.train: what {prepared.data.samples.name_of('the data set')}.state_dict() returns {contents.state_fault} (a "
            "shuffle buffer's content may be missing): a resumed run reads the stream again from its beginning, which is exact "
            "and takes as long as reading so far did"
        )
    own = b"differs" if "train" in {**contents.differing, **contents.memory} else b"repeats"
    return b"differs" not in gather_bytes(own, strategy.device)


def check_sampler(
    sampler: Component | None, strategy: Strategy, prepared: RunComponents, warn: Callable[[str], None]
) -> None:
    """Refuse samplers that draw other samples on each rank or at each drawing, or know of ranks. Collective.

    Raises:
        ConfigurationError: naming the sampler and the cure; on every rank alike.
    """
    data = prepared.data
    if sampler is None or not isinstance(data, MappedData) or not isinstance(data.order, SamplerOrder):
        return
    order, size, world_size = data.order, len(data.samples), strategy.world_size
    repeats = order.repeats()
    distinct = len({i for n in range(order.num_batches(0)) for i in order.batch(0, n).tolist()})
    own = json.dumps([order.drawn_until(0), repeats, distinct]).encode()
    told = [json.loads(reply) for reply in gather_bytes(own, strategy.device)]
    shares = next((part for part in _parts(order.sampler) if getattr(part, "num_replicas", 1) not in (None, 1)), None)
    names = type(order.sampler).__name__
    if shares is not None or (len({drawn for drawn, _, _ in told}) > 1 and all(repeats for _, repeats, _ in told)):
        names = type(shares).__name__ if shares is not None else names
        raise sampler.error(
            f"{names} draws other samples on each rank (a part of the data: {distinct} of {size}). Lockstep shares each global "
            f"batch out by itself, so all ranks must draw the same: leave the sampler out (data.shuffle shuffles), or give it "
            "num_replicas: 1 and rank: 0",
        )
    if not all(repeats for _, repeats, _ in told):
        raise sampler.error(
            f"{names} draws something else when it is drawn again under one seed: neither ranks nor a resumed run would "
            f"draw the same. Let it draw from {GLOBAL_RNGS}, which are seeded for each epoch (for torch's samplers leave out "
            "'generator'), and keep no count of its own",
        )
    if world_size > 1 and distinct in (size // world_size, -(-size // world_size)):
        warn(
            f"data: {names} draws {distinct} of {size} samples, just one of {world_size} ranks' share. All ranks draw the same "
            "and share it out: if it divides by the number of ranks, let it draw all"
        )


def _parts(sampler: Any) -> Iterator[Any]:
    """Yield a sampler and those that it draws from."""
    for _ in range(8):
        yield sampler
        sampler = getattr(sampler, "batch_sampler", None) or getattr(sampler, "sampler", None)
        if sampler is None:
            return
