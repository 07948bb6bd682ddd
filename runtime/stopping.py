"""Signals, gathered into one local wish to stop; the ranks then agree on a step (``control.py``).

Imports no torch, so that handlers can be installed before the seconds that importing it takes.
"""

from __future__ import annotations

import signal
import time
from types import FrameType

_SAME_WISH_SECONDS = 2.0  # Ctrl-C reaches a worker from the terminal and again from the launch agent


class StopWish:
    """Whether this process has been asked to stop.

    The first SIGINT, SIGTERM or SIGUSR1 is a wish: the run saves after the step that all ranks agree on. A later SIGINT
    ends the process at once; the last checkpoint then counts.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._since = 0.0
        self._previous: dict[int, object] = {}

    def __bool__(self) -> bool:
        return self.reason is not None

    def install(self) -> None:
        """Take over the signals; only the main thread can, others leave them as they are."""
        try:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                self._previous[number] = signal.signal(number, self._note)
        except ValueError:
            pass

    def uninstall(self) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.reason is None:
            self.reason, self._since = signal.Signals(number).name, now
        elif number == signal.SIGINT and now - self._since > _SAME_WISH_SECONDS:
            raise KeyboardInterrupt
