"""Local stop requests: signals, the STOP file, the time limit. The ranks then agree on a step (``collectives.py``).

Python runs signal handlers only between bytecodes of the main thread: not while it is in a collective, waits for data or
launches a long kernel. The C part of a handler still writes to a socket (``signal.set_wakeup_fd``), and a thread that reads
it sees the signal at once. Imports no torch, so that it can be installed before torch is imported, which takes seconds.
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
_SAME_REQUEST_SECONDS = 2.0  # Ctrl-C reaches a worker from the terminal and again from the launch agent
_POLL_SECONDS = 0.5
_START_SECONDS = 5.0  # grace time while there is nothing to save; the main thread may wait for a rank that was killed
_PATIENCE_SECONDS = 2.0  # for calls that may hang on a dead file server or a full pipe
_leave: Callable[[int], object] = os._exit  # the main thread may be unable to raise SystemExit


class StopRequest:
    """Whether this process has been asked to stop.

    The first SIGINT, SIGTERM, SIGUSR1 or SIGHUP (a closed terminal; unless ignored by nohup), the STOP file or the time limit
    requests a stop: the run saves after the step that all ranks agree on. A second SIGINT ends the process at once, and so does
    the end of the grace time: all stacks on stderr, exit code 1. In an interactive Python (a notebook, ``python -i``) the main
    thread gets a KeyboardInterrupt instead.

    Args:
        grace_seconds: time to stop in, from the request or the last :meth:`restart_grace_time`; None: unlimited. May be set
            later.

    Attributes:
        reason: the first cause: a signal's name, "the file STOP", "the time limit".
        on_leave: called in a separate thread before the process is killed; waited for 2 s at most.
    """

    def __init__(self, grace_seconds: float | None = None) -> None:
        self.reason: str | None = None
        self.grace_seconds = grace_seconds
        self.on_leave: Callable[[], None] | None = None
        self._requested_at = self._grace_from = self._interrupted_at = 0.0
        self._starting = False
        self._causes: dict[str, Callable[[], bool]] = {}
        self._raise_in_main: str | None = None
        self._previous: dict[int, Any] = {}

    def __bool__(self) -> bool:
        return self.reason is not None

    def install(self) -> None:
        """Install the signal handlers (only in the main thread; others cannot) and start watching."""
        assert self not in _installed
        self._reader, self._writer = socket.socketpair()
        self._reader.settimeout(_POLL_SECONDS)
        self._writer.setblocking(False)
        self._closed = threading.Event()
        self._previous_fd = -1
        _installed.append(self)
        if threading.current_thread() is threading.main_thread():
            self._previous_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
            self._previous = {number: signal.signal(number, self._note) for number in _SIGNALS if _is_handled(number)}
        self._threads = [_start_thread(self._watch)]

    def uninstall(self) -> None:
        """Restore the signal handlers and stop watching: the run has stopped in time."""
        if self not in _installed:
            return
        self._restore_handlers()
        self._closed.set()
        self._writer.shutdown(socket.SHUT_WR)
        for thread in self._threads:
            thread.join(_PATIENCE_SECONDS)
        self._reader.close()
        self._writer.close()

    def watch_file(self, path: Path) -> bool:
        """Request a stop as soon as a file appears; return whether one exists already, left over from before.

        A left-over file is no request, whether or not it is removed; touched or created again, it is. Only the file's identity
        is compared, since the clocks of hosts differ.
        """
        assert self in _installed
        known = _identity(path)
        # In a separate thread, which may hang with its file server while signals must still be handled.
        self._threads.append(_start_thread(lambda: self._poll_file(path, known)))
        return known is not None

    def limit_time(self, seconds: float, since: float, margin: Callable[[], float]) -> None:
        """Request a stop ``margin()`` seconds before ``seconds`` have passed since ``since`` (of ``time.monotonic``)."""
        self.watch_for("the time limit", lambda: time.monotonic() - since + margin() >= seconds)

    def watch_for(self, reason: str, happened: Callable[[], bool]) -> None:
        """Request a stop once ``happened()`` is true; it is called twice a second, in the watcher thread."""
        self._causes[reason] = happened

    def starting(self) -> None:
        """Limit the grace time to 5 s until :meth:`started`: the main thread waits for other ranks, nothing to save yet."""
        self._starting = True
        self.restart_grace_time()

    def started(self) -> None:
        """Allow the whole grace time from here on."""
        self._starting = False
        self.restart_grace_time()

    def restart_grace_time(self) -> None:
        """Restart the grace time: the main thread begins something that is allowed all of it, such as a save."""
        self._grace_from = time.monotonic()

    def _note(self, number: int, frame: object) -> None:
        """Handle a signal in the main thread, without waiting for the watcher thread, which may have seen it already."""
        why, self._raise_in_main = self._raise_in_main, None
        if why is not None:
            raise KeyboardInterrupt(why)
        self._request(signal.Signals(number).name)

    def _request(self, reason: str) -> None:
        if self.reason is None:
            self._requested_at = time.monotonic()  # before the reason, which other threads check first
            self.reason = reason

    def _watch(self) -> None:
        while True:
            with suppress(TimeoutError):
                numbers = self._reader.recv(256)
                if not numbers:  # uninstalled, after all earlier signals
                    return
                self._receive(numbers)
            self._check_time()

    def _receive(self, numbers: bytes) -> None:
        for number in numbers:
            if number in _SIGNALS:  # other signals may have handlers too: DataLoader's for SIGCHLD
                self._request(signal.Signals(number).name)
        if signal.SIGINT in numbers:
            now = time.monotonic()
            self._interrupted_at = self._interrupted_at or now
            if now - self._interrupted_at > _SAME_REQUEST_SECONDS:
                self._force("interrupted again")
        if self._previous_fd >= 0:
            with suppress(OSError):  # full, or closed by its owner
                os.write(self._previous_fd, numbers)

    def _check_time(self) -> None:
        if self.reason is None:
            for reason, happened in list(self._causes.items()):
                if happened():
                    self._request(reason)
        if self.reason is None or self.grace_seconds is None:
            return
        now = time.monotonic()
        waited = now - max(self._requested_at, self._grace_from)
        if self._starting and waited >= min(_START_SECONDS, self.grace_seconds):
            self._force(f"asked to stop ({self.reason}) before the first step", stacks=False)
        elif waited >= self.grace_seconds:
            self._force(f"asked to stop ({self.reason}) {now - self._requested_at:.0f} s ago and still busy")

    def _poll_file(self, path: Path, known: object) -> None:
        while not self._closed.wait(_POLL_SECONDS):
            current = _identity(path)
            if current is not None and current != known:
                self._request(f"the file {path.name}")
                return
            known = current

    def _force(self, why: str, *, stacks: bool = True) -> None:
        """End the process. It may hang anywhere, so nothing here may wait for long."""
        why += "; exiting without a save, the last checkpoint counts"
        self._interrupted_at = self._grace_from = (
            time.monotonic()
        )  # retry after the same delay if the process is still alive
        if sys.flags.interactive or hasattr(sys, "ps1"):
            if self._previous:
                self._raise_in_main = why
                _thread.interrupt_main(signal.SIGUSR1)  # SIGINT would count as another interrupt
            return
        try:
            _start_thread(lambda: _write_message(why, stacks=stacks)).join(_PATIENCE_SECONDS)
            if self.on_leave is not None:
                _start_thread(self.on_leave).join(_PATIENCE_SECONDS)
        finally:
            _leave(1)

    def _restore_handlers(self) -> None:
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


def _start_thread(target: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=target, name="lockstep-stopping", daemon=True)
    thread.start()
    return thread


def _identity(path: Path) -> tuple[int, int] | None:
    with suppress(OSError):
        status = path.stat()
        return status.st_ino, status.st_mtime_ns
    return None


def _is_handled(number: signal.Signals) -> bool:
    return number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN  # nohup: the terminal may close


def _write_message(why: str, *, stacks: bool) -> None:
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
    """Restore handlers before signals are unblocked: else they go to our socket, and ``terminate()`` does not end the child."""
    for stop_request in reversed(_installed.copy()):
        stop_request._restore_handlers()
    _after_fork()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)
