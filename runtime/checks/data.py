"""Check that data and samplers are reproducible, and equal on every rank."""

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
    """Warn if a sample differs when it is read again (data set, transforms, collate function). Collective.

    Returns:
        whether training samples are reproducible on every rank.
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
            "but takes as long as reading it the first time"
        )
    own = b"differs" if "train" in {**contents.differing, **contents.memory} else b"repeats"
    return b"differs" not in gather_bytes(own, strategy.device)


def check_sampler(
    sampler: Component | None, strategy: Strategy, prepared: RunComponents, warn: Callable[[str], None]
) -> None:
    """Refuse samplers that draw different samples on each rank or on repetition, or that shard by rank. Collective.

    Raises:
        ConfigurationError: names the sampler and the cure; equal on every rank.
    """
    data = prepared.data
    if sampler is None or not isinstance(data, MappedData) or not isinstance(data.order, SamplerOrder):
        return
    order, size, world_size = data.order, len(data.samples), strategy.world_size
    repeats = order.repeats()
    distinct = len({i for n in range(order.num_batches(0)) for i in order.batch(0, n).tolist()})
    own = json.dumps([order.drawn_until(0), repeats, distinct]).encode()
    replies = [json.loads(reply) for reply in gather_bytes(own, strategy.device)]
    sharding = next((part for part in _parts(order.sampler) if getattr(part, "num_replicas", 1) not in (None, 1)), None)
    name = type(order.sampler).__name__
    if sharding is not None or (len({drawn for drawn, _, _ in replies}) > 1 and all(r for _, r, _ in replies)):
        name = type(sharding).__name__ if sharding is not None else name
        raise sampler.error(
            f"{name} draws different samples on each rank (a part of the data: {distinct} of {size}). Lockstep itself divides "
            f"each global batch between ranks, so all ranks must draw the same: remove the sampler (data.shuffle shuffles), or "
            "give it num_replicas: 1 and rank: 0",
        )
    if not all(reproducible for _, reproducible, _ in replies):
        raise sampler.error(
            f"{name} draws different samples when it is drawn again with the same seed, so ranks and a resumed run would "
            f"differ. Draw from {GLOBAL_RNGS}, which are seeded for each epoch (for torch's samplers leave out "
            "'generator'), and keep no counter in the sampler",
        )
    if world_size > 1 and distinct in (size // world_size, -(-size // world_size)):
        warn(
            f"data: {name} draws {distinct} of {size} samples, exactly the share of one of {world_size} ranks. All ranks draw "
            "the same and divide it between them: if the sampler divides by the number of ranks, let it draw all samples"
        )


def _parts(sampler: Any) -> Iterator[Any]:
    """Yield a sampler and those that it wraps."""
    for _ in range(8):
        yield sampler
        sampler = getattr(sampler, "batch_sampler", None) or getattr(sampler, "sampler", None)
        if sampler is None:
            return
