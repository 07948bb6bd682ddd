"""``metrics.jsonl`` in the run folder: the durable record of a run, one JSON object per line."""

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
    """Writes one record per line and flushes it.

    A resumed run drops the records of steps after its checkpoint, which it will repeat, and a last line that was truncated
    when the process was killed.

    Args:
        path: the file.
        resumed_step: steps completed before this start.
        evaluation_due: whether the evaluation after that step is still to be made or repeated.

    Attributes:
        earlier: records of earlier starts: the evaluations, and the last training report before each.
    """

    def __init__(self, path: Path, *, resumed_step: int, evaluation_due: bool = False) -> None:
        self._path = path
        self.earlier: list[Mapping[str, Any]] = []
        if path.exists():
            self._drop_after(resumed_step, evaluation_due=evaluation_due)
            self.earlier = _evaluations(path)
        self._file = path.open("a", encoding="utf-8")

    def log_summary(self, values: Mapping[str, Any]) -> None:
        """Write the facts of this start of the run: world size, K, device, versions."""
        self._write({"event": "start", **values})

    def log(self, values: Mapping[str, Result], *, step: int, epoch: int, split: str) -> None:
        """Write a training report, or the results of an evaluation."""
        kind = {"event": "train"} if split == "train" else {"event": "evaluation", "split": split}
        self._write({**kind, "step": step, "epoch": epoch, **values})

    def log_checkpoint(self, name: str, *, step: int, digest: str) -> None:
        """Write the digest of a checkpoint's state."""
        self._write({"event": "checkpoint", "step": step, "name": name, "digest": digest})

    def rewind(self, step: int) -> None:
        """Drop the records of later steps, which the run will repeat."""
        with suppress(OSError):
            self._file.close()
            self._drop_after(step)
        with suppress(OSError):
            self._file = self._path.open("a", encoding="utf-8")

    def log_message(self, text: str) -> None:
        """Write a message record."""
        self._write({"event": "message", "text": text})

    def finish(self, outcome: str) -> None:
        """Write the outcome."""
        if not self._file.closed:
            self._write({"event": "end", "outcome": outcome})
            with suppress(OSError):
                self._file.close()

    def _drop_after(self, step: int, *, evaluation_due: bool = False) -> None:
        lines = self._path.read_text("utf-8", errors="replace").splitlines()
        last = step - 0.5 if evaluation_due else step  # of the evaluations that are complete
        kept = [line for line in lines if _step_of(line) <= (last if '"event": "evaluation"' in line else step)]
        replace_file(self._path, "".join(f"{line}\n" for line in kept))

    def _write(self, record: Mapping[str, Any]) -> None:
        with suppress(OSError, ValueError):  # a full disk must not end the run; saving a checkpoint will report it
            self._file.write(json.dumps({**record, "time": round(time.time(), 3)}) + "\n")
            self._file.flush()


def _evaluations(path: Path) -> list[Mapping[str, Any]]:
    """Return the evaluation records, the last training report before each, and the last one at the end."""
    records: list[Mapping[str, Any]] = []
    report: str | None = None
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if '"event": "train"' in line:
                report = line
            elif '"event": "evaluation"' in line:
                records += [json.loads(text) for text in (report, line) if text is not None]
                report = None
    return records if report is None else [*records, json.loads(report)]


def _step_of(line: str) -> float:
    try:
        return float(json_files.parse(line).get("step", 0))
    except (ValueError, TypeError, AttributeError, OverflowError):
        return float("inf")
