"""The limit of open files (``ulimit -n``): raised as far as it goes, and named where it is reached all the same."""

from __future__ import annotations

import errno
import resource
from contextlib import suppress

from runtime.errors import OpenFilesError, causes

_SAID = (
    "too many open files",
    "received 0 items of ancdata",
)  # torch says the second where a descriptor could not be sent


def raise_open_files_limit() -> None:
    """Let this process and its children open as many files as they may: the usual soft limit of 1024 is soon reached."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft not in (hard, resource.RLIM_INFINITY):
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def open_files_error(error: BaseException) -> OpenFilesError | None:
    """Return what to say of an error that came of too many open files, here or in a loader worker; None of all others."""
    for cause in causes(error):
        full = isinstance(cause, OSError) and cause.errno in (errno.EMFILE, errno.ENFILE)
        if full or any(text in str(cause).lower() for text in _SAID):
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            return OpenFilesError(
                f"too many open files: this process may open {limit} (ulimit -n); raise that, or lower data.loader.num_workers "
                f"or prefetch_factor, or let the data set close its files ({cause})"
            )
    return None
