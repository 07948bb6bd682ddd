"""The loader: torch's DataLoader, whose workers live as long as the run, have no state, and are never waited for in vain."""

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
"""Makes what yields batches, of a data set and a ``batch_sampler`` of :class:`SlotIndex`."""


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
    """Return a maker of loaders with these options; a worker is told nothing, so it has no state of its own.

    Without workers and pinned memory there is nothing for a DataLoader to do, and it would cost 50 µs a batch.

    Args:
        closing: where the same data is read again and again: workers then live until this is closed.
    """
    if num_workers == 0 and not pin_memory:
        return read_here
    make_loader = partial(
        DataLoader,
        collate_fn=_as_it_is,
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
    """Makes one loader, of one data set, and gives it the indices of one pass after the other. Its workers live on."""

    def __init__(self, make_loader: MakeLoader) -> None:
        self._make_loader = make_loader
        self._passes = _Passes()
        self._loader: Any = None
        self._samples: Any = None

    def __call__(self, samples: Any, *, batch_sampler: Iterator[Any]) -> Iterable[Any]:
        """Return the loader; what was left of the last pass is dropped when it is iterated again."""
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
    """A batch sampler of the present pass's indices."""

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
            # It ignores SIGTERM, so torch and Python would wait for it for ever.
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
    """Return what to say of an error that came of a loader worker's end; None of all others.

    Torch raises it in a signal handler, so wherever the main thread happens to be: in the user's model, in an evaluation, or
    while a file is written (torch 2.13, ``_set_SIGCHLD_handler``).
    """
    for cause in causes(error):
        if isinstance(cause, RuntimeError) and "DataLoader" in str(cause):
            return DataError(_what_was_lost(str(cause)))
    return None


def _what_was_lost(reason: str) -> str:
    late = re.search(r"timed out after (\S+) seconds", reason)
    if late is not None:
        return (
            f"data.loader.timeout_seconds: no loader worker gave a batch within {late[1]} s, so reading is slower than that or "
            "hangs; raise it (0 waits without end), or look at what the data set waits for"
        )
    return (
        f"a loader worker was lost ({reason}); a killed worker is mostly out of memory or shared memory: "
        "lower data.loader.num_workers or prefetch_factor"
    )


def read_here(samples: Any, *, batch_sampler: Iterator[Any]) -> Iterator[Any]:
    """Read in this process: a loader without workers."""
    return map(samples.__getitems__, batch_sampler)


def _as_it_is(batch: Any) -> Any:
    return batch


def _start_worker(own: Callable[[int], Any] | None, worker: int) -> None:
    """Leave SIGINT, SIGTERM, SIGUSR1 and SIGHUP to the training process; a worker ends with its parent.

    Torch's own watch begins behind this, so it would take whoever adopts the worker of a dead process for its parent.
    """
    protect_output()
    threading.Thread(target=_end_with_parent, name="lockstep-orphan", daemon=True).start()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if own is not None:
        own(worker)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
