"""Standard output and error that never fail: a closed pipe or terminal, or a full disk, must not end a run.

All that is printed passes through ``sys.stdout`` and ``sys.stderr``, by whomever: print, rich, warnings, logging, the
user's own code. So these two are replaced, in every process of ours, and nothing else needs to know of it. What cannot be
written is lost; the run folder has the record. Imports the standard library alone.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from errno import EBADF, EIO, EPIPE
from typing import Any

_GONE = (EPIPE, EIO, EBADF)  # a pipe without a reader, a terminal that was closed, a stream that was


class UnfailingStream:
    """A text stream that passes on what it can, and is otherwise silent.

    Args:
        stream: where text goes; None where Python has found none.
    """

    def __init__(self, stream: Any) -> None:
        self.inner = stream

    def write(self, text: str) -> int:
        """Write, or lose the text."""
        try:
            self._write(text)
        except (OSError, ValueError, AttributeError) as error:  # closed streams raise ValueError
            self._lose(error)
        return len(text)

    def _write(self, text: str) -> None:
        try:
            self.inner.write(text)
        except UnicodeEncodeError as error:  # an ASCII terminal
            self.inner.write(text.encode(error.encoding, "replace").decode(error.encoding))

    def writelines(self, lines: Iterable[str]) -> None:
        """Write one after the other."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush, or lose what was waiting."""
        try:
            self.inner.flush()
        except (OSError, ValueError, AttributeError) as error:
            self._lose(error)

    def isatty(self) -> bool:
        """Tell whether it is a terminal."""
        try:
            return bool(self.inner.isatty())
        except (OSError, ValueError, AttributeError):
            return False

    def settle(self) -> None:
        """Leave nothing waiting: Python flushes when it ends, and makes an exit code of 120 of a failure."""
        try:
            self.inner.flush()
        except (OSError, ValueError, AttributeError):
            self._point_at_nothing()

    def _lose(self, error: Exception) -> None:
        """Where nobody will ever read again, let what is still waiting, and all that follows, go nowhere."""
        if isinstance(error, OSError) and error.errno in _GONE:
            self._point_at_nothing()

    def _point_at_nothing(self) -> None:
        with suppress(OSError, ValueError, AttributeError):
            descriptor = self.inner.fileno()
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, descriptor)
            os.close(nothing)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def protect_output() -> None:
    """Replace both streams of this process for good: for entry points and workers.

    Descriptors 0 to 2 that are closed are pointed at nothing first: the next file to be opened would get their number, and
    what is written to standard error without Python would end up in it.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, UnfailingStream):
            setattr(sys, name, UnfailingStream(stream))


def settle_output() -> None:
    """Let the process end without an error about output that nobody reads."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, UnfailingStream):
            stream.settle()


@contextmanager
def protected_output() -> Iterator[None]:
    """Replace both streams for a while: in a process that is the user's own."""
    before = sys.stdout, sys.stderr
    replaced = [stream if isinstance(stream, UnfailingStream) else UnfailingStream(stream) for stream in before]
    sys.stdout, sys.stderr = replaced
    try:
        yield
    finally:
        settle_output()
        for name, ours, theirs in zip(("stdout", "stderr"), replaced, before, strict=True):
            if getattr(sys, name) is ours:  # the user may have put another one there meanwhile
                setattr(sys, name, theirs)
