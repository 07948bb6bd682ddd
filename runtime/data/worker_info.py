"""Number of the current loader worker: known to the runtime, hidden from user code whose result must not depend on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.utils.data import _utils, get_worker_info


def reader() -> tuple[int, int]:
    """Return the number of this loader worker, and the number of workers; (0, 1) in the training process."""
    info = get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)


@contextmanager
def hidden() -> Iterator[None]:
    """Make ``torch.utils.data.get_worker_info()`` return None, as in a process without workers.

    A data set that calls it divides itself (as Hugging Face's streams do) or draws from the worker's seed: either result
    depends on the number of workers. torch keeps it in one global of a private module, in all versions up to 2.13.
    """
    info = _utils.worker._worker_info
    _utils.worker._worker_info = None
    try:
        yield
    finally:
        _utils.worker._worker_info = info
