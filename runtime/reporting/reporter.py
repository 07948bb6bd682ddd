"""Forwards a run's reports to its trackers, and its messages to the logger too. Only rank 0 has trackers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.reporting.tracker import TrackedRun, Tracker

if TYPE_CHECKING:
    from runtime.evaluation.metrics import Result

_LOGGER = logging.getLogger("lockstep.run")


class Reporter(Tracker):
    """Several trackers as one. A tracker that raises is warned of and no longer called; the run continues.

    Messages from before the summary are sent once it is logged; on ranks other than 0 they are dropped.
    """

    def __init__(self) -> None:
        self._trackers: list[Tracker] = []
        self._early: list[tuple[int, str]] = []
        self._summary_logged = False

    def open(self, trackers: Sequence[Tracker], run: TrackedRun) -> None:
        """Start trackers, and forward to them from now on."""
        self._trackers = list(trackers)
        self.start(run)

    def start(self, run: TrackedRun) -> None:
        """See :class:`Tracker`."""
        self._each(lambda tracker: tracker.start(run))

    def log_summary(self, values: Mapping[str, Any]) -> None:
        """See :class:`Tracker`."""
        self._each(lambda tracker: tracker.log_summary(values))
        self._summary_logged = True
        early, self._early = self._early, []
        for level, text in early:
            self._emit(level, text)

    def log(self, values: Mapping[str, Result], *, step: int, epoch: int, split: str) -> None:
        """See :class:`Tracker`."""
        self._each(lambda tracker: tracker.log(values, step=step, epoch=epoch, split=split))

    def log_figure(self, name: str, path: Path, *, step: int, split: str) -> None:
        """See :class:`Tracker`."""
        self._each(lambda tracker: tracker.log_figure(name, path, step=step, split=split))

    def log_artifact(self, name: str, path: Path, *, step: int) -> None:
        """See :class:`Tracker`."""
        self._each(lambda tracker: tracker.log_artifact(name, path, step=step))

    def log_checkpoint(self, name: str, *, step: int, digest: str) -> None:
        """See :class:`Tracker`."""
        self._each(lambda tracker: tracker.log_checkpoint(name, step=step, digest=digest))

    def log_message(self, text: str) -> None:
        """See :class:`Tracker`."""
        self._each(lambda tracker: tracker.log_message(text))

    def rewind(self, step: int) -> None:
        """See :class:`Tracker`."""
        self._each(lambda tracker: tracker.rewind(step))

    def finish(self, outcome: str) -> None:
        """See :class:`Tracker`."""
        self._each(lambda tracker: tracker.finish(outcome))
        self._trackers = []

    def message(self, text: str) -> None:
        """Send one line to the logger and the trackers."""
        self._emit(logging.INFO, text)

    def warn(self, text: str) -> None:
        """Send a one-line warning to the logger and the trackers."""
        self._emit(logging.WARNING, text)

    def _emit(self, level: int, text: str) -> None:
        if not self._summary_logged:
            self._early.append((level, text))
            return
        _LOGGER.log(level, text)
        self.log_message(f"warning: {text}" if level == logging.WARNING else text)

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for tracker in tuple(self._trackers):
            try:
                call(tracker)
            except Exception as error:
                self._trackers = [kept for kept in self._trackers if kept is not tracker]
                self.warn(f"{type(tracker).__qualname__} stopped working ({reason(error)}); continuing without it")


def reason(error: Exception) -> str:
    """Return an error's type and message in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
