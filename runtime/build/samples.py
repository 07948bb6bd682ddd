"""Builds samples from a data set, and the loader factory from ``data.loader``."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch

from runtime.build.component import Component
from runtime.config.data import DataSection, LoaderSection, SplitSection
from runtime.data.fields import Fields
from runtime.data.loading import MakeLoader, loader_factory
from runtime.data.samples import Samples
from runtime.data.streams import StreamSamples


def build_samples(
    source: Any,
    section: SplitSection | None,
    *,
    transform: Component | None,
    collate: Component | None,
    fields: Fields,
    seed: int,
    batch_size: int,
    drop_last: bool,
    one_batch_each: bool,
) -> Samples | StreamSamples:
    """Build the samples of one data set.

    Args:
        section: of the split; None for held-out data.
        batch_size: of a stream: items that are batched together.
        drop_last: of a stream: whether its last, smaller batch is left out.
        one_batch_each: of a stream that yields batches: whether each is read on its own.
    """
    functions: dict[str, Any] = {
        "transform": transform.function() if transform is not None else None,
        "collate": collate.function() if collate is not None else None,
    }
    if section is None or section.sharded_by is None:
        return Samples(source, seed=seed, **functions)
    batches = section.yields == "batches"
    if batches:
        functions["collate"] = None  # only for splits that yield samples
        functions |= {"batches": True, "fields": fields}
    return StreamSamples(
        source,
        sharded_by=section.sharded_by,
        batch_size=1 if batches and one_batch_each else batch_size,
        seed=seed,
        drop_last=drop_last,
        **functions,
    )


def order_of_stream(data: DataSection) -> str | None:
    """Return the first key that sets an order, which a stream cannot have; None if there is none."""
    orders = ("shuffle", "sampler", "batch_sampler", "group_by_length", "budget", "balance", "weights")
    return next((name for name in orders if getattr(data, name)), None)


def build_loader(
    section: LoaderSection,
    worker_init: Component | None,
    device: torch.device,
    closing: ExitStack | None = None,
    *,
    workers: int | None = None,
) -> MakeLoader:
    """Return a factory of loaders; memory is pinned by default if there is a GPU.

    Args:
        closing: keeps workers alive until it is closed, for data that is read repeatedly.
        workers: how many to start. Default: as configured.
    """
    return loader_factory(
        num_workers=section.num_workers if workers is None else workers,
        prefetch_factor=section.prefetch_factor,
        pin_memory=device.type == "cuda" if section.pin_memory is None else section.pin_memory,
        timeout_seconds=section.timeout_seconds,
        start_method=section.start_method,
        worker_init=worker_init.function() if worker_init is not None else None,
        closing=closing,
    )
