"""What a run's data holds, as far as a few samples and the values that orders follow from tell: agreed on by all ranks.

It belongs to what a checkpoint is compared with, so that data of the same length and other contents does not go unnoticed.
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
from runtime.distributed.rank_consistency import agreed
from runtime.strategies import Strategy

_BEGINNING, _DRAWN = "beginning", "drawn"

Known = Mapping[str, Mapping[str, str]]
"""By part of the data: what was looked at (a sample's number, ``beginning``, ``order``, ``held out``), and a digest of it."""


class UnrepeatableRead(NamedTuple):
    """What gives something else when a sample is read again.

    Args:
        name: what the user calls it.
        stage: which it is.
        stream: whether it is part of a stream.
    """

    name: str
    stage: Stage
    stream: bool


@dataclass(frozen=True)
class DataContents:
    """What was found.

    Args:
        known: digests that are equal on all ranks, of what gives the same when it is read again.
        differing: by part of the data, what gives something else when a sample is read again.
        memory: by part of the data, the data set or transform that overwrites samples, and how.
        state_fault: why a training stream cannot go on from the data set's own state; empty if it can, or has none.
    """

    known: Known = field(default_factory=dict)
    differing: Mapping[str, UnrepeatableRead] = field(default_factory=dict)
    memory: Mapping[str, str] = field(default_factory=dict)
    state_fault: str = ""


def contents_of(
    parts: Mapping[str, Samples | StreamSamples | None],
    strategy: Strategy,
    loader: Callable[..., MakeLoader],
    *,
    order: Order | None = None,
    stored: Known | None = None,
) -> DataContents:
    """Look at the data. Collective: every rank must call this.

    Args:
        parts: by name, as in ``data``.
        loader: returns a maker of loaders for a device, with as many ``workers`` as are asked for.
        order: of the training samples.
        stored: what a checkpoint knows; the same samples are read, once.

    Raises:
        RanksDifferError: the ranks have different data; on every rank alike.
    """
    make_loader = loader(strategy.device, few=True)
    # What is read of a stream in this process may be gone, so that a process of its own reads it.
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
            found = probe(
                samples,
                probe_ids(len(samples)) if ids is None else ids,
                times=1 if before else 2,
                make_loader=make_loader,
            )
            known[name] = {str(number): one.content for number, one in found.items() if one.content is not None}
            if hasattr(samples.source, "ids"):  # a part that was held out, or what was left
                known[name]["held out"] = digest(samples.source.ids)
            fault = next((one.memory for one in found.values() if one.memory), "")
            if fault:
                at_fault = "the transform" if "held by the data set" in fault else "the data set"
                memory[name] = f"{samples.name_of(at_fault)} ({at_fault}) {fault}"
            stage = next((one.differs for one in found.values() if one.differs is not None), None)
        else:
            first = probe_stream(samples, times=1 if stored is not None else 2, make_loader=read_apart)
            if first.content is not None and samples.sharded_by == "runtime":  # otherwise each rank has another one
                known[name] = {_BEGINNING: first.content}
            stage = first.differs
            state_fault = first.state_fault if name == "train" else state_fault
        if stage is not None:
            differing[name] = UnrepeatableRead(samples.name_of(stage), stage, stream=isinstance(samples, StreamSamples))
    if isinstance(order, SamplerOrder):
        known["sampler" if order.draws_samples else "batch_sampler"] = {_DRAWN: str(order.drawn_until(0))}
    if order is not None and order.basis() and "train" in known:
        known["train"]["order"] = order.basis()
    # Ranks that read different streams, or draw different samples, are found by other checks, with another cure.
    common = agreed(
        known, may_differ=(_BEGINNING, _DRAWN), host=socket.gethostname(), device=strategy.device, where=_where
    )
    return DataContents(common, differing, memory, state_fault)


def does_not_repeat(part: str, differing: UnrepeatableRead) -> str:
    """Return the warning, in one line."""
    of_stream = differing.stream and differing.stage == "the data set"
    again = "the stream is read again from its beginning" if of_stream else "a sample is read again"
    seeds = "for each batch" if of_stream else "for each sample"
    more = "; do not count the epochs yourself, set_epoch(epoch) is called with each" if of_stream else ""
    return (
        f"{'.'.join(split_key(part))}: {differing.name} ({differing.stage}) gives something else when {again} under its seed; "
        "the result is neither repeatable nor resumable, and depends on processes and workers: a generator of its own "
        "(NumPy's "
        f"default_rng, a torch.Generator, Albumentations 2) gets no seed. Draw from {GLOBAL_RNGS}, seeded {seeds}, or "
        "seed its own from there: generator = np.random.default_rng(np.random.randint(2**31)), or Compose's set_random_seed, "
        f"{seeds}{more}"
    )


def changed(stored: Known, now: Known) -> dict[str, str]:
    """Return, by part of the data, what is another than it was, in words."""
    found: dict[str, str] = {}
    for part, before in stored.items():
        after = now.get(part, {})
        keys = [key for key in before if key in after and before[key] != after[key]]
        if keys:
            found[part] = " and ".join(_in_words(key) for key in keys)
    return found


_WORDS = {
    "order": "the values that the order follows from",
    "held out": "which samples are held out",
    _BEGINNING: "the beginning of the stream",
    _DRAWN: "what is drawn for the first epoch",
}


def _in_words(key: str) -> str:
    return _WORDS.get(key, f"sample {key}")


def _where(part: str, key: str) -> str:
    return f"{_in_words(key)} of {'.'.join(split_key(part))}"
