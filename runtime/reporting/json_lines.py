"""``metrics.jsonl`` in the run folder: the durable record of a run, one JSON object a line."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime import json_files
from runtime.reporting.tracker import Tracker
from runtime.state.durable_files import replace_file

if TYPE_CHECKING:
    from runtime.evaluation.metrics import Result


class JsonLines(Tracker):
    """Writes one record a line and flushes it.

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

    def log_summary(self, values: Mapping[str, Any]) -> None:
        """Write what this start of the run is: world size, K, device, versions."""
        self._write({"event": "start", **values})

    def log(self, values: Mapping[str, Result], *, step: int, epoch: int, split: str) -> None:
        """Write a report of training, or the results of an evaluation."""
        kind = {"event": "train"} if split == "train" else {"event": "evaluation", "split": split}
        self._write({**kind, "step": step, "epoch": epoch, **values})

    def rewind(self, step: int) -> None:
        """Drop the records of later steps, which the run is about to take again."""
        with suppress(OSError):
            self._file.close()
            self._drop_after(step)
        with suppress(OSError):
            self._file = self._path.open("a", encoding="utf-8")

    def log_message(self, text: str) -> None:
        """Write one line for people."""
        self._write({"event": "message", "text": text})

    def finish(self, outcome: str) -> None:
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
