"""Where a run's figures go: the console, ``metrics.jsonl`` in the run folder, Weights & Biases. Rank 0 alone writes."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from runtime import json_files
from runtime.evaluation.metrics import Result
from runtime.state.durable_files import replace_file


class Tracker(Protocol):
    """Somewhere that figures go."""

    def start(self, facts: Mapping[str, Any]) -> None:
        """Take note of what this start of the run is."""
        ...

    def train(self, step: int, epoch: int, values: Mapping[str, Result]) -> None:
        """Take a report of training; ``step`` and ``epoch`` count from 1."""
        ...

    def evaluation(self, split: str, step: int, epoch: int, results: Mapping[str, Result]) -> None:
        """Take the results of an evaluation."""
        ...

    def rewind(self, step: int) -> None:
        """Drop the figures of later steps: the run goes back to this one and takes others."""
        ...

    def message(self, text: str) -> None:
        """Take one line for people."""
        ...

    def close(self, outcome: str) -> None:
        """Finish; ``outcome`` is finished, stopped or failed."""
        ...


class Reporter:
    """Passes everything on to several trackers; on ranks other than 0 there are none.

    Messages that come before there are trackers follow once they have started.
    """

    def __init__(self) -> None:
        self._trackers: Sequence[Tracker] = ()
        self._early: list[str] = []

    def open(self, trackers: Sequence[Tracker]) -> None:
        """Begin to pass things on."""
        self._trackers = trackers

    def start(self, facts: Mapping[str, Any]) -> None:
        """See :class:`Tracker`."""
        for tracker in self._trackers:
            tracker.start(facts)
            for text in self._early:
                tracker.message(text)

    def train(self, step: int, epoch: int, values: Mapping[str, Result]) -> None:
        """See :class:`Tracker`."""
        for tracker in self._trackers:
            tracker.train(step, epoch, values)

    def evaluation(self, split: str, step: int, epoch: int, results: Mapping[str, Result]) -> None:
        """See :class:`Tracker`."""
        for tracker in self._trackers:
            tracker.evaluation(split, step, epoch, results)

    def rewind(self, step: int) -> None:
        """See :class:`Tracker`."""
        for tracker in self._trackers:
            tracker.rewind(step)

    def message(self, text: str) -> None:
        """See :class:`Tracker`."""
        if not self._trackers:
            self._early.append(text)
        for tracker in self._trackers:
            tracker.message(text)

    def close(self, outcome: str) -> None:
        """See :class:`Tracker`."""
        for tracker in self._trackers:
            tracker.close(outcome)


class JsonLines:
    """``metrics.jsonl``: one record a line, flushed as it is written; the durable record of a run.

    A resumed run drops the records of steps after its checkpoint, which it is about to repeat, and a last line that a kill
    cut short.

    Args:
        path: the file.
        resumed_step: steps that the run has behind it.
        evaluation_due: the evaluation after that step is still to come, or to be repeated.

    Attributes:
        earlier: evaluations of earlier starts, and each last report of training before one.
    """

    def __init__(self, path: Path, *, resumed_step: int, evaluation_due: bool = False) -> None:
        self._path = path
        self.earlier: list[Mapping[str, Any]] = []
        if path.exists():
            self._drop_after(resumed_step, evaluation_due=evaluation_due)
            self.earlier = _evaluations(path)
        self._file = path.open("a", encoding="utf-8")

    def start(self, facts: Mapping[str, Any]) -> None:
        """Write what this start of the run is: world size, K, device, versions."""
        self._write({"event": "start", **facts})

    def train(self, step: int, epoch: int, values: Mapping[str, Result]) -> None:
        """Write a report of training."""
        self._write({"event": "train", "step": step, "epoch": epoch, **values})

    def evaluation(self, split: str, step: int, epoch: int, results: Mapping[str, Result]) -> None:
        """Write the results of an evaluation."""
        self._write({"event": "evaluation", "split": split, "step": step, "epoch": epoch, **results})

    def rewind(self, step: int) -> None:
        """Drop the records of later steps, which the run is about to take again."""
        with suppress(OSError):
            self._file.close()
            self._drop_after(step)
        with suppress(OSError):
            self._file = self._path.open("a", encoding="utf-8")

    def message(self, text: str) -> None:
        """Write one line for people."""
        self._write({"event": "message", "text": text})

    def close(self, outcome: str) -> None:
        """Write how it ended."""
        if not self._file.closed:
            self._write({"event": "end", "outcome": outcome})
            with suppress(OSError):
                self._file.close()

    def _drop_after(self, step: int, *, evaluation_due: bool = False) -> None:
        lines = self._path.read_text("utf-8", errors="replace").splitlines()
        last = step - 0.5 if evaluation_due else step  # the last evaluation that is behind the run
        kept = [line for line in lines if _step_of(line) <= (last if '"event": "evaluation"' in line else step)]
        replace_file(self._path, "".join(f"{line}\n" for line in kept))

    def _write(self, record: Mapping[str, Any]) -> None:
        with suppress(OSError, ValueError):  # a full disk must not end the run; saving will tell
            self._file.write(json.dumps({**record, "time": round(time.time(), 3)}) + "\n")
            self._file.flush()


def _evaluations(path: Path) -> list[Mapping[str, Any]]:
    """Return the records of evaluations, and of the last report of training before each, and at the end."""
    found: list[Mapping[str, Any]] = []
    report: str | None = None
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if '"event": "train"' in line:
                report = line
            elif '"event": "evaluation"' in line:
                found += [json.loads(text) for text in (report, line) if text is not None]
                report = None
    return found if report is None else [*found, json.loads(report)]


def _step_of(line: str) -> float:
    try:
        return float(json_files.parse(line).get("step", 0))
    except (ValueError, TypeError, AttributeError, OverflowError):
        return float("inf")
