"""Digests of a run's data, of a few samples and of the values that determine orders, checked to be equal on all ranks.

They are compared with those of a checkpoint, to detect data of the same length but different contents.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from runtime.build.sources import split_key
from runtime.data.digests import digest
from runtime.data.loading import MakeLoader
from runtime.data.order import Order, SamplerOrder
from runtime.data.probing import GLOBAL_RNGS, Stage, probe, probe_ids, probe_stream
from runtime.data.samples import Samples
from runtime.data.streams import StreamSamples
from runtime.distributed.rank_consistency import common_digests
from runtime.strategies import Strategy

_BEGINNING, _DRAWN = "beginning", "drawn"

Digests = Mapping[str, Mapping[str, str]]
"""Digests by part of the data and item (a sample's index, ``beginning``, ``order``, ``held out``)."""


class UnrepeatableRead(NamedTuple):
    """The cause of a sample that differs when it is read again.

    Args:
        name: of the data set, transform or collate, as the user wrote it.
        stage: which of them it is.
        stream: whether the data is a stream.
    """

    name: str
    stage: Stage
    stream: bool


@dataclass(frozen=True)
class DataContents:
    """Result of reading a few samples of all data.

    Args:
        known: digests that are equal on all ranks, of data that is the same when it is read again.
        differing: by part of the data, the cause of samples that differ when they are read again.
        memory: by part of the data, the data set or transform that overwrites samples, and how.
        state_fault: why a training stream cannot resume from the data set's own state; empty if it can, or has none.
    """

    known: Digests = field(default_factory=dict)
    differing: Mapping[str, UnrepeatableRead] = field(default_factory=dict)
    memory: Mapping[str, str] = field(default_factory=dict)
    state_fault: str = ""


def contents_of(
    parts: Mapping[str, Samples | StreamSamples | None],
    strategy: Strategy,
    loader: Callable[..., MakeLoader],
    *,
    order: Order | None = None,
    stored: Digests | None = None,
) -> DataContents:
    """Read a few samples of all data. Collective: every rank must call this.

    Args:
        parts: samples by name, as in ``data``.
        loader: ``Builder.loader``.
        order: of the training samples.
        stored: digests in the checkpoint; the same samples are read, once.

    Raises:
        RanksDifferError: the ranks have different data; raised on every rank.
    """
    make_loader = loader(strategy.device, few=True)
    # Items of a stream read in this process might be lost to training, so a worker process reads them.
    read_apart = loader(strategy.device, workers=1)
    known: dict[str, dict[str, str]] = {}
    differing: dict[str, UnrepeatableRead] = {}
    memory: dict[str, str] = {}
    state_fault = ""
    for name, samples in parts.items():
        if samples is None:
            continue
        before = (stored or {}).get(name, {})
        if isinstance(samples, Samples):
            ids = [int(key) for key in before if key.isdigit() and int(key) < len(samples)] if before else None
            probes = probe(
                samples,
                probe_ids(len(samples)) if ids is None else ids,
                times=1 if before else 2,
                make_loader=make_loader,
            )
            known[name] = {str(index): result.content for index, result in probes.items() if result.content is not None}
            if hasattr(samples.source, "ids"):  # a part that was held out, or the rest
                known[name]["held out"] = digest(samples.source.ids)
            fault = next((result.memory for result in probes.values() if result.memory), "")
            if fault:
                memory[name] = fault
            stage = next((result.differs for result in probes.values() if result.differs is not None), None)
        else:
            first = probe_stream(samples, times=1 if stored is not None else 2, make_loader=read_apart)
            if first.content is not None and samples.sharded_by == "runtime":  # otherwise it differs between ranks
                known[name] = {_BEGINNING: first.content}
            stage = first.differs
            state_fault = first.state_fault if name == "train" else state_fault
        if stage is not None:
            differing[name] = UnrepeatableRead(samples.name_of(stage), stage, stream=isinstance(samples, StreamSamples))
    if isinstance(order, SamplerOrder):
        known["sampler" if order.draws_samples else "batch_sampler"] = {_DRAWN: str(order.drawn_until(0))}
    if order is not None and order.basis() and "train" in known:
        known["train"]["order"] = order.basis()
    # Ranks that read different streams, or draw different samples, are detected by other checks, which suggest another fix.
    common = common_digests(
        known, may_differ=(_BEGINNING, _DRAWN), host=socket.gethostname(), device=strategy.device, where=_where
    )
    return DataContents(common, differing, memory, state_fault)


def does_not_repeat(part: str, differing: UnrepeatableRead) -> str:
    """Return the warning, in one line."""
    of_stream = differing.stream and differing.stage == "the data set"
    again = "the stream is read again from its beginning" if of_stream else "a sample is read again"
    seeds = "for each batch" if of_stream else "for each sample"
    hint = "; do not count epochs in the data set, set_epoch(epoch) is called for each" if of_stream else ""
    return (
        f"{'.'.join(split_key(part))}: {differing.name} ({differing.stage}) gives different data when {again} under its seed; "
        "the result is neither repeatable nor resumable, and depends on processes and workers: a private generator (NumPy's "
        f"default_rng, a torch.Generator, Albumentations 2) is not seeded. Draw from {GLOBAL_RNGS}, seeded {seeds}, or "
        "seed the private generator from them: generator = np.random.default_rng(np.random.randint(2**31)), or Compose's "
        f"set_random_seed, {seeds}{hint}"
    )


def changed(stored: Digests, now: Digests) -> dict[str, str]:
    """Describe, by part of the data, what has changed."""
    differences: dict[str, str] = {}
    for part, before in stored.items():
        after = now.get(part, {})
        keys = [key for key in before if key in after and before[key] != after[key]]
        if keys:
            differences[part] = " and ".join(_description(key) for key in keys)
    return differences


_DESCRIPTIONS = {
    "order": "the list of values that determine the order",
    "held out": "the set of held-out samples",
    _BEGINNING: "the beginning of the stream",
    _DRAWN: "the sequence drawn for the first epoch",
}


def _description(key: str) -> str:
    return _DESCRIPTIONS.get(key, f"sample {key}")


def _where(part: str, key: str) -> str:
    return f"{_description(key)} of {'.'.join(split_key(part))}"
