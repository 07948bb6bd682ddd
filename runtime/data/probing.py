"""Read a few samples before the first step: digest their contents, and check that reading them again gives the same.

They are read in a loader worker if there are workers, as in training: files that a data set opens at its first read must
not be open before workers are forked.
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
    """Findings about one sample, or about the first ones of a stream.

    Args:
        content: digest of the data set's sample; None if it cannot be read or does not repeat.
        differs: the first stage that does not repeat under the same seed; None if all do.
        memory: how samples overwrite each other; empty if they do not, or if unknown.
        state_fault: why a stream cannot resume from the data set's own state; empty if it can, or if unknown.
    """

    content: str | None
    differs: Stage | None = None
    memory: str = ""
    state_fault: str = ""


def probe(samples: Samples, ids: list[int], *, times: int, make_loader: MakeLoader) -> dict[int, ProbeResult]:
    """Probe samples by id.

    Args:
        times: number of readings of each; ``differs`` needs at least two.
    """
    indices = iter([SlotIndex(0, np.array([number], dtype=np.int64)) for number in ids])
    results = read(_Probe(samples, times), indices, make_loader)
    return dict(zip(ids, results, strict=True))


def probe_stream(samples: StreamSamples, *, times: int, make_loader: MakeLoader) -> ProbeResult:
    """Probe the first samples of a stream; none if reading could consume them.

    Args:
        times: number of readings; all but ``content`` need at least two.
        make_loader: of a loader with a worker, which reads a copy of the stream, so that this process consumes nothing.
    """
    if _is_consumed_by_reading(samples.source) or _default_start_method() != "fork":
        return ProbeResult(None)
    try:
        result: ProbeResult = next(iter(read(_StreamProbe(samples, times), iter([None]), make_loader)))
    except Exception:  # training reports it
        return ProbeResult(None)
    return result


def _default_start_method() -> str:
    """Return the default start method of workers without fixing it: a user may still choose another."""
    return multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]


def _is_consumed_by_reading(source: object) -> bool:
    """Return whether a stream is or holds an iterator, open file or connection, whose position a forked worker shares."""
    held = [source, *getattr(source, "__dict__", {}).values()]
    return any(hasattr(value, "__next__") or hasattr(value, "fileno") for value in held)


def probe_ids(size: int) -> list[int]:
    """Return the ids of the first, the middle and the last sample."""
    return sorted({0, size // 2, size - 1})


class _Probe(Dataset[Any]):
    """Passed to a loader in place of the samples: gives a :class:`ProbeResult` for each."""

    def __init__(self, samples: Samples, times: int) -> None:
        self._samples, self._times = samples, times

    def __getitem__(self, index: SlotIndex) -> ProbeResult:
        return self.__getitems__(index)

    def __getitems__(self, index: SlotIndex) -> ProbeResult:
        # Around all readings: code that draws without a seed then draws different values in the second.
        with preserved_random_state(_CPU):
            readings = [self._samples.read_in_stages(index, digest) for _ in range(self._times)]
        if any(isinstance(reading, SampleFailure) for reading in readings):
            return ProbeResult(None)  # training reports it when it reads the sample
        result = _compared(readings)
        return result if result.differs or self._times < 2 else result._replace(memory=self._memory(index))

    def _memory(self, index: SlotIndex) -> str:
        try:
            with preserved_random_state(_CPU):
                return self._samples.memory_fault(index, (int(index.ids[0]) + 1) % len(self._samples))
        except Exception:  # training reports it
            return ""


class _StreamProbe(Dataset[Any]):
    """Passed to a loader in place of a stream: gives a :class:`ProbeResult` for its first samples."""

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
        result = _compared([reading[:3] for reading in readings])
        return result if result.differs else result._replace(state_fault=readings[-1].state_fault)


def _compared(readings: list[Any]) -> ProbeResult:
    """Compare the digests of each stage."""
    for stage, digests in zip(_STAGES, zip(*readings, strict=True), strict=True):
        if len(set(digests)) > 1:
            return ProbeResult(None if stage == _STAGES[0] else readings[0][0], stage)
    return ProbeResult(readings[0][0])
