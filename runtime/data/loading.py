"""The loader: torch's DataLoader with stateless workers that live as long as the run; waiting for them has a timeout."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any, cast

import torch
from torch.utils.data import DataLoader

from runtime.data.samples import SampleFailure
from runtime.errors import DataError, causes
from runtime.output import protect_output

MakeLoader = Callable[..., Iterable[Any]]
"""Returns an iterable of batches, given a data set and a ``batch_sampler`` of :class:`SlotIndex`."""


def loader_factory(
    *,
    num_workers: int,
    prefetch_factor: int,
    pin_memory: bool,
    timeout_seconds: int,
    start_method: str | None,
    worker_init: Callable[[int], Any] | None = None,
    closing: ExitStack | None = None,
) -> MakeLoader:
    """Return a function that makes loaders with these options. Workers receive only indices, so they have no state.

    Without workers and pinned memory no DataLoader is used: it would do nothing, at 50 µs per batch.

    Args:
        closing: for data that is read repeatedly: workers then live until this is closed.
    """
    if num_workers == 0 and not pin_memory:
        return read_here
    make_loader = partial(
        DataLoader,
        collate_fn=_unchanged,
        num_workers=num_workers,
        prefetch_factor=prefetch_factor if num_workers else None,
        pin_memory=pin_memory,
        timeout=timeout_seconds if num_workers else 0,
        multiprocessing_context=start_method if num_workers else None,
        worker_init_fn=partial(_start_worker, worker_init),
        generator=torch.Generator(),  # otherwise the loader draws its base seed from the default generator
    )
    if closing is None or num_workers == 0:
        return make_loader
    lasting = LastingLoader(partial(make_loader, persistent_workers=True))
    closing.callback(lasting.close)
    return lasting


class LastingLoader:
    """One loader of one data set for several passes, so that its workers persist between passes."""

    def __init__(self, make_loader: MakeLoader) -> None:
        self._make_loader = make_loader
        self._passes = _Passes()
        self._loader: Any = None
        self._samples: Any = None

    def __call__(self, samples: Any, *, batch_sampler: Iterator[Any]) -> Iterable[Any]:
        """Return the loader; iterating it again drops what was left of the last pass."""
        assert self._samples in (None, samples), "a lasting loader reads one data set"
        self._passes.indices = batch_sampler
        if self._loader is None:
            self._samples, self._loader = samples, self._make_loader(samples, batch_sampler=self._passes)
        return cast(Iterable[Any], self._loader)

    def close(self) -> None:
        """End the workers."""
        iterator = getattr(self._loader, "_iterator", None)
        self._loader = self._samples = None
        if iterator is not None:
            iterator._shutdown_workers()


class _Passes:
    """A batch sampler of the current pass's indices."""

    indices: Iterator[Any] = iter(())

    def __iter__(self) -> Iterator[Any]:
        return self.indices


def read(samples: Any, indices: Iterator[Any], make_loader: MakeLoader) -> Iterator[Any]:
    """Yield the batches of the given indices, in order.

    Raises:
        DataError: the data set raised, a worker died, or none gave a batch in time.
    """
    try:
        batches = iter(make_loader(samples, batch_sampler=indices))
        for worker in getattr(batches, "_workers", ()):
            # Workers ignore SIGTERM, so torch and Python would wait for them forever.
            worker._popen.terminate = worker._popen.kill
        for batch in batches:
            if isinstance(batch, SampleFailure):
                raise DataError(batch.message)
            yield batch
    except RuntimeError as error:
        lost = lost_worker(error)
        if lost is None:
            raise
        raise lost from error


def lost_worker(error: BaseException) -> DataError | None:
    """Return the error to report if ``error`` was caused by the death or timeout of a loader worker, else None.

    Torch raises it in a signal handler, so wherever the main thread happens to be: in the user's model, in an evaluation, or
    while a file is written (torch 2.13, ``_set_SIGCHLD_handler``).
    """
    for cause in causes(error):
        if isinstance(cause, RuntimeError) and "DataLoader" in str(cause):
            return DataError(_lost_worker_message(str(cause)))
    return None


def _lost_worker_message(reason: str) -> str:
    timeout = re.search(r"timed out after (\S+) seconds", reason)
    if timeout is not None:
        return (
            f"data.loader.timeout_seconds: no loader worker returned a batch within {timeout[1]} s: reading is too slow or "
            "hangs; raise it (0 disables the timeout), or check what the data set waits for"
        )
    return (
        f"a loader worker was lost ({reason}); usually it was killed because memory or shared memory ran out: "
        "lower data.loader.num_workers or prefetch_factor"
    )


def read_here(samples: Any, *, batch_sampler: Iterator[Any]) -> Iterator[Any]:
    """Read in this process, without workers."""
    return map(samples.__getitems__, batch_sampler)


def _unchanged(batch: Any) -> Any:
    return batch


def _start_worker(worker_init: Callable[[int], Any] | None, worker: int) -> None:
    """Ignore SIGINT, SIGTERM, SIGUSR1 and SIGHUP, which the training process handles, and exit with the parent.

    Torch's own check of the parent starts after this, so if the parent is already dead it would take the process that
    adopted the worker for its parent.
    """
    protect_output()
    threading.Thread(target=_end_with_parent, name="lockstep-orphan", daemon=True).start()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if worker_init is not None:
        worker_init(worker)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
