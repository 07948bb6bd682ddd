"""A few samples of the data, read before the first step: what they hold, and whether they are the same when read again.

They are read through a loader worker where there are workers, as in training: what a data set opens when it is first read
must not be open before workers are forked.
"""

from __future__ import annotations

import multiprocessing
from copy import copy
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from runtime.data.digests import digest
from runtime.data.loading import MakeLoader, read
from runtime.data.samples import SampleFailure, Samples, SlotIndex
from runtime.data.streams import StreamSamples
from runtime.randomness import preserved_random_state

GLOBAL_RNGS = "Python's, NumPy's or torch's global generator"

Stage = Literal["the data set", "the transform", "the collate function"]
_STAGES: tuple[Stage, ...] = ("the data set", "the transform", "the collate function")

_CPU = torch.device("cpu")


class ProbeResult(NamedTuple):
    """One sample, or the first ones of a stream.

    Args:
        content: digest of what the data set gives; None if it cannot be read, or not twice the same.
        differs: what gives something else when it is asked again under the same seed; None if nothing does.
        memory: how samples overwrite each other; empty if they do not, or if that is not known.
        state_lacks: why a stream cannot go on from the data set's own state; empty if it can, or if that is not known.
    """

    content: str | None
    differs: Stage | None = None
    memory: str = ""
    state_lacks: str = ""


def probe(samples: Samples, ids: list[int], *, times: int, make_loader: MakeLoader) -> dict[int, ProbeResult]:
    """Look at samples.

    Args:
        times: how often each is read; once tells nothing of ``differs``.
    """
    indices = iter([SlotIndex(0, np.array([number], dtype=np.int64)) for number in ids])
    found = read(_Probe(samples, times), indices, make_loader)
    return dict(zip(ids, found, strict=True))


def probe_stream(samples: StreamSamples, *, times: int, make_loader: MakeLoader) -> ProbeResult:
    """Look at the first samples of a stream; at none where what is read of it may be gone.

    Args:
        times: how often it is read; once tells nothing but its content.
        make_loader: of a loader with a worker. The worker has a copy of the stream, of which nothing is taken in this process.
    """
    if _is_used_up(samples.source) or _default_start_method() != "fork":
        return ProbeResult(None)
    try:
        found: ProbeResult = next(iter(read(_StreamProbe(samples, times), iter([None]), make_loader)))
    except Exception:  # training reports it
        return ProbeResult(None)
    return found


def _default_start_method() -> str:
    """Return how workers are started by default, without settling it: a user may still choose another."""
    return multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]


def _is_used_up(source: object) -> bool:
    """Tell whether a stream is, or holds, an iterator, an open file or a connection, whose place a forked worker shares."""
    held = [source, *getattr(source, "__dict__", {}).values()]
    return any(hasattr(value, "__next__") or hasattr(value, "fileno") for value in held)


def few_of(size: int) -> list[int]:
    """Return the ids of the first, the middle and the last sample."""
    return sorted({0, size // 2, size - 1})


class _Probe(Dataset[Any]):
    """What a loader reads in place of the samples: what is found out about each."""

    def __init__(self, samples: Samples, times: int) -> None:
        self._samples, self._times = samples, times

    def __getitem__(self, index: SlotIndex) -> ProbeResult:
        return self.__getitems__(index)

    def __getitems__(self, index: SlotIndex) -> ProbeResult:
        with preserved_random_state(
            _CPU
        ):  # around both: what draws without a seed draws something else the second time
            readings = [self._samples.read_in_stages(index, digest) for _ in range(self._times)]
        if any(isinstance(reading, SampleFailure) for reading in readings):
            return ProbeResult(None)  # training reports it when it reads the sample
        found = _compared(readings)
        return found if found.differs or self._times < 2 else found._replace(memory=self._memory(index))

    def _memory(self, index: SlotIndex) -> str:
        try:
            with preserved_random_state(_CPU):
                return self._samples.memory_at_fault(index, (int(index.ids[0]) + 1) % len(self._samples))
        except Exception:  # training reports it
            return ""


class _StreamProbe(Dataset[Any]):
    """What a loader reads in place of a stream: what is found out about its first samples."""

    def __init__(self, samples: StreamSamples, times: int) -> None:
        self._samples, self._times = samples, times

    def __getitem__(self, index: None) -> ProbeResult:
        return self.__getitems__(index)

    def __getitems__(self, index: None) -> ProbeResult:
        try:
            with preserved_random_state(_CPU):
                readings = [copy(self._samples).beginning(with_state=number > 0) for number in range(self._times)]
        except Exception:  # training reports it
            return ProbeResult(None)
        found = _compared([reading[:3] for reading in readings])
        return found if found.differs else found._replace(state_lacks=readings[-1].state_lacks)


def _compared(readings: list[Any]) -> ProbeResult:
    """Compare the digests of each stage."""
    for stage, digests in zip(_STAGES, zip(*readings, strict=True), strict=True):
        if len(set(digests)) > 1:
            return ProbeResult(None if stage == _STAGES[0] else readings[0][0], stage)
    return ProbeResult(readings[0][0])
