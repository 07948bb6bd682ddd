"""The loader: torch's DataLoader, whose workers live as long as the run, have no state, and are never waited for in vain."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader

from runtime.data.samples import SampleFailure
from runtime.errors import DataError, causes
from runtime.processes.output import protect_output

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
) -> MakeLoader:
    """Return a maker of loaders with these options; a worker is told nothing, so it has no state of its own.

    Without workers and pinned memory there is nothing for a DataLoader to do, and it would cost 50 µs a batch.
    """
    if num_workers == 0 and not pin_memory:
        return read_here
    return partial(
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


def read(samples: Any, indices: Iterator[Any], make_loader: MakeLoader) -> Iterator[Any]:
    """Yield the batches of the given indices, in order.

    Raises:
        DataError: the data set raised, or a worker died.
    """
    batches = iter(make_loader(samples, batch_sampler=indices))
    for worker in getattr(batches, "_workers", ()):
        # It ignores SIGTERM, so torch and Python would wait for it for ever.
        worker._popen.terminate = worker._popen.kill
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except RuntimeError as error:
            lost = lost_worker(error)
            if lost is None:
                raise
            raise lost from error
        if isinstance(batch, SampleFailure):
            raise DataError(batch.message)
        yield batch


def lost_worker(error: BaseException) -> DataError | None:
    """Return what to say of an error that came of a loader worker's end; None of all others.

    Torch raises it in a signal handler, so wherever the main thread happens to be: in the user's model, in an evaluation, or
    while a file is written (torch 2.13, ``_set_SIGCHLD_handler``).
    """
    for cause in causes(error):
        if isinstance(cause, RuntimeError) and "DataLoader" in str(cause):
            return DataError(
                f"a loader worker was lost ({cause}); a killed worker is mostly out of memory or shared memory: "
                "lower data.loader.num_workers or prefetch_factor"
            )
    return None


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
