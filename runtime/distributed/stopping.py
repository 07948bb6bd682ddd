"""Signals, a file, a time limit: one local wish to stop; the ranks then agree on a step (``control.py``).

Python runs signal handlers only between bytecodes of the main thread: not while it sits in a collective, waits for data or
launches a long kernel. The C part of a handler still writes to a socket (``signal.set_wakeup_fd``), and a thread that reads
it knows of the signal at once. Imports no torch, so that it can be installed before the seconds that importing it takes.
"""

from __future__ import annotations

import _thread
import faulthandler
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_SAME_WISH_SECONDS = 2.0  # Ctrl-C reaches a worker from the terminal and again from the launch agent
_POLL_SECONDS = 0.5
_START_SECONDS = (
    5.0  # to leave in before there is anything to save; the main thread may wait for a rank that was killed
)
_PATIENCE_SECONDS = 2.0  # for what may hang on a dead file server or a full pipe
_leave: Callable[[int], object] = os._exit  # the main thread may never again come to raise SystemExit


class StopRequest:
    """Whether this process has been asked to stop.

    The first SIGINT, SIGTERM, SIGUSR1 or SIGHUP (a closed terminal; unless nohup ignores it), the file or the time limit is
    a wish: the run saves after the step that all ranks agree on. A second SIGINT ends the process at once, and so does the
    end of the grace time: all stacks on stderr, exit code 1. In an interactive Python (a notebook, ``python -i``) the main
    thread gets a KeyboardInterrupt instead.

    Args:
        grace_seconds: time to leave in, from the first wish or the last :meth:`moved`; None for ever. May be set later.

    Attributes:
        reason: what asked first: a signal's name, "the file STOP", "the time limit".
        on_leave: called before the process is ended by force, in a thread of its own and waited for 2 s at most.
    """

    def __init__(self, grace_seconds: float | None = None) -> None:
        self.reason: str | None = None
        self.grace_seconds = grace_seconds
        self.on_leave: Callable[[], None] | None = None
        self._wished_at = self._moved_at = self._interrupted_at = 0.0
        self._starting = False
        self._causes: dict[str, Callable[[], bool]] = {}
        self._raise_in_main: str | None = None
        self._previous: dict[int, Any] = {}

    def __bool__(self) -> bool:
        return self.reason is not None

    def install(self) -> None:
        """Take over the signals, which only the main thread can (others leave them as they are), and begin to watch."""
        assert self not in _installed
        self._reader, self._writer = socket.socketpair()
        self._reader.settimeout(_POLL_SECONDS)
        self._writer.setblocking(False)
        self._closed = threading.Event()
        self._previous_fd = -1
        _installed.append(self)
        if threading.current_thread() is threading.main_thread():
            self._previous_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
            self._previous = {number: signal.signal(number, self._note) for number in _SIGNALS if _is_wish(number)}
        self._threads = [_started(self._watch)]

    def uninstall(self) -> None:
        """Give the signals back and end the watching: the process has left in time."""
        if self not in _installed:
            return
        self._give_back()
        self._closed.set()
        self._writer.shutdown(socket.SHUT_WR)
        for thread in self._threads:
            thread.join(_PATIENCE_SECONDS)
        self._reader.close()
        self._writer.close()

    def watch_file(self, path: Path) -> bool:
        """Wish to stop as soon as a file appears; return whether one is there, left over from before.

        That one is no wish, be it removed now or not; made anew or touched, it is. No clock is asked: hosts' clocks differ.
        """
        assert self in _installed
        known = _identity(path)
        # A thread of its own: while a file server is silent, so is whoever asks it, and signals must still be heard.
        self._threads.append(_started(lambda: self._look_for(path, known)))
        return known is not None

    def limit_time(self, seconds: float, since: float, margin: Callable[[], float]) -> None:
        """Wish to stop once ``margin()`` is all that is left of the seconds since ``since`` (of ``time.monotonic``)."""
        self.watch_for("the time limit", lambda: time.monotonic() - since + margin() >= seconds)

    def watch_for(self, reason: str, happened: Callable[[], bool]) -> None:
        """Wish to stop once something has happened; it is asked twice a second, in the watcher thread."""
        self._causes[reason] = happened

    def starting(self) -> None:
        """Give a wish 5 s until :meth:`started`: the main thread waits for other ranks, and there is nothing to save yet."""
        self._starting = True
        self.moved()

    def started(self) -> None:
        """Give a wish the whole grace time from here on."""
        self._starting = False
        self.moved()

    def moved(self) -> None:
        """Begin the grace time anew: the main thread has got to something that has a right to its own, such as a save."""
        self._moved_at = time.monotonic()

    def _note(self, number: int, frame: object) -> None:
        """Handle a signal in the main thread. The watcher may know of it long since; here it costs no wait for a thread."""
        why, self._raise_in_main = self._raise_in_main, None
        if why is not None:
            raise KeyboardInterrupt(why)
        self._wish(signal.Signals(number).name)

    def _wish(self, reason: str) -> None:
        if self.reason is None:
            self._wished_at = time.monotonic()  # before the reason, which other threads look at first
            self.reason = reason

    def _watch(self) -> None:
        while True:
            with suppress(TimeoutError):
                numbers = self._reader.recv(256)
                if not numbers:  # uninstalled, and every signal before that is dealt with
                    return
                self._receive(numbers)
            self._look_at_clock()

    def _receive(self, numbers: bytes) -> None:
        for number in numbers:
            if number in _SIGNALS:  # others have handlers too: DataLoader's for SIGCHLD
                self._wish(signal.Signals(number).name)
        if signal.SIGINT in numbers:
            now = time.monotonic()
            self._interrupted_at = self._interrupted_at or now
            if now - self._interrupted_at > _SAME_WISH_SECONDS:
                self._force("interrupted again")
        if self._previous_fd >= 0:
            with suppress(OSError):  # full, or closed by its owner
                os.write(self._previous_fd, numbers)

    def _look_at_clock(self) -> None:
        if self.reason is None:
            for reason, happened in list(self._causes.items()):
                if happened():
                    self._wish(reason)
        if self.reason is None or self.grace_seconds is None:
            return
        now = time.monotonic()
        waited = now - max(self._wished_at, self._moved_at)
        if self._starting and waited >= min(_START_SECONDS, self.grace_seconds):
            self._force(f"asked to stop ({self.reason}) before the first step", stacks=False)
        elif waited >= self.grace_seconds:
            self._force(f"asked to stop ({self.reason}) {now - self._wished_at:.0f} s ago and still busy")

    def _look_for(self, path: Path, known: object) -> None:
        while not self._closed.wait(_POLL_SECONDS):
            found = _identity(path)
            if found is not None and found != known:
                self._wish(f"the file {path.name}")
                return
            known = found

    def _force(self, why: str, *, stacks: bool = True) -> None:
        """End the process, which may hang anywhere; so nothing here may wait for long."""
        why += "; leaving without a save, the last checkpoint counts"
        self._interrupted_at = self._moved_at = time.monotonic()  # if this is of no avail, then again after as long
        if sys.flags.interactive or hasattr(sys, "ps1"):
            if self._previous:
                self._raise_in_main = why
                _thread.interrupt_main(signal.SIGUSR1)  # SIGINT would come back to us as one more
            return
        try:
            _started(lambda: _tell(why, stacks=stacks)).join(_PATIENCE_SECONDS)
            if self.on_leave is not None:
                _started(self.on_leave).join(_PATIENCE_SECONDS)
        finally:
            _leave(1)

    def _give_back(self) -> None:
        _installed.remove(self)
        if not self._previous:
            return
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not set from Python
        self._previous.clear()
        try:
            signal.set_wakeup_fd(self._previous_fd)
        except (OSError, ValueError):  # closed by its owner
            signal.set_wakeup_fd(-1)


def _started(target: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=target, name="lockstep-stopping", daemon=True)
    thread.start()
    return thread


def _identity(path: Path) -> tuple[int, int] | None:
    with suppress(OSError):
        found = path.stat()
        return found.st_ino, found.st_mtime_ns
    return None


def _is_wish(number: signal.Signals) -> bool:
    return number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN  # nohup: the terminal may go


def _tell(why: str, *, stacks: bool) -> None:
    with suppress(OSError):
        os.write(2, f"lockstep: {why}\n".encode())  # not sys.stderr: the main thread may hold its lock
    if stacks:
        faulthandler.dump_traceback(file=2, all_threads=True)


_installed: list[StopRequest] = []  # the innermost last
_forking = threading.local()


def _before_fork() -> None:
    _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS if _installed else ())


def _after_fork() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)


def _after_fork_in_child() -> None:
    """Undo before any signal is let in: it would be written to our socket, and no ``terminate()`` would end the child."""
    for wish in reversed(_installed.copy()):
        wish._give_back()
    _after_fork()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)
