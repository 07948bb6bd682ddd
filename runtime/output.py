"""Standard output and error that never fail: a closed pipe or terminal, or a full disk, must not end a run.

Everything printed (print, rich, warnings, logging, user code) goes through ``sys.stdout`` and ``sys.stderr``, so these two are
replaced in every process. Text that cannot be written is dropped; the run folder has the record. Imports only the standard
library.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from errno import EBADF, EIO, EPIPE
from typing import Any

_GONE = (EPIPE, EIO, EBADF)  # a pipe without a reader, a closed terminal, a closed stream


class UnfailingStream:
    """A text stream that silently drops what cannot be written.

    Args:
        stream: the wrapped stream; None if Python has none.
    """

    def __init__(self, stream: Any) -> None:
        self.inner = stream

    def write(self, text: str) -> int:
        """Write the text, or drop it."""
        try:
            self._write(text)
        except (OSError, ValueError, AttributeError) as error:  # closed streams raise ValueError
            self._drop(error)
        return len(text)

    def _write(self, text: str) -> None:
        try:
            self.inner.write(text)
        except UnicodeEncodeError as error:  # an ASCII terminal
            self.inner.write(text.encode(error.encoding, "replace").decode(error.encoding))

    def writelines(self, lines: Iterable[str]) -> None:
        """Write each line."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush, or drop what is buffered."""
        try:
            self.inner.flush()
        except (OSError, ValueError, AttributeError) as error:
            self._drop(error)

    def isatty(self) -> bool:
        """Return whether the stream is a terminal."""
        try:
            return bool(self.inner.isatty())
        except (OSError, ValueError, AttributeError):
            return False

    def settle(self) -> None:
        """Leave nothing buffered: if Python's flush at exit fails, the exit code becomes 120."""
        try:
            self.inner.flush()
        except (OSError, ValueError, AttributeError):
            self._redirect_to_null()

    def _drop(self, error: Exception) -> None:
        """Discard buffered and later output if the reader is gone for good."""
        if isinstance(error, OSError) and error.errno in _GONE:
            self._redirect_to_null()

    def _redirect_to_null(self) -> None:
        with suppress(OSError, ValueError, AttributeError):
            descriptor = self.inner.fileno()
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, descriptor)
            os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def protect_output() -> None:
    """Replace both streams of this process permanently; for entry points and workers.

    Closed descriptors among 0 to 2 are opened on the null device first: otherwise the next opened file would get their number,
    and native code's writes to standard error would end up in it.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, UnfailingStream):
            setattr(sys, name, UnfailingStream(stream))


def settle_output() -> None:
    """Flush both streams, so that the process exits without an error about unread output."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, UnfailingStream):
            stream.settle()


@contextmanager
def protected_output() -> Iterator[None]:
    """Replace both streams temporarily, in the user's own process."""
    before = sys.stdout, sys.stderr
    replaced = [stream if isinstance(stream, UnfailingStream) else UnfailingStream(stream) for stream in before]
    sys.stdout, sys.stderr = replaced
    try:
        yield
    finally:
        settle_output()
        for name, ours, theirs in zip(("stdout", "stderr"), replaced, before, strict=True):
            if getattr(sys, name) is ours:  # the user may have replaced it meanwhile
                setattr(sys, name, theirs)
