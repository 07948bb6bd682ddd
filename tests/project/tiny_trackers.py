"""Trackers that fail, one that notes what it is called with, and what is none."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lockstep import TrackedRun, Tracker


class Noting(Tracker):
    """Appends the names of its calls to ``calls.jsonl`` in the run folder."""

    def start(self, run: TrackedRun) -> None:
        self._file = (run.folder / "calls.jsonl").open("a")
        self._note("start", name=run.name, id=run.id, step=run.step, seed=run.configuration["seed"])

    def log_summary(self, values: Mapping[str, Any]) -> None:
        self._note("log_summary", world_size=values["world_size"])

    def log(self, values: Mapping[str, Any], *, step: int, epoch: int, split: str) -> None:
        self._note("log", values=values, step=step, epoch=epoch, split=split)

    def log_figure(self, name: str, path: Any, *, step: int, split: str) -> None:
        assert path.read_bytes().startswith(b"\x89PNG")
        self._note("log_figure", name=name, step=step, split=split)

    def log_artifact(self, name: str, path: Any, *, step: int) -> None:
        assert path.is_file()
        self._note("log_artifact", name=name, step=step)

    def log_message(self, text: str) -> None:
        self._note("log_message", text=text)

    def finish(self, outcome: str) -> None:
        self._note("finish", outcome=outcome)
        self._file.close()

    def _note(self, method: str, **given: Any) -> None:
        self._file.write(json.dumps({"method": method, **given}) + "\n")
        self._file.flush()


class Failing(Tracker):
    """Raises in one of its methods, at every call."""

    def __init__(self, method: str) -> None:
        if method == "__init__":
            raise OSError("no server")
        setattr(self, method, self._fail)

    def _fail(self, *given: Any, **named: Any) -> None:
        raise OSError("no server")


class NoTracker:
    """Extends nothing."""


def made() -> object:
    return object()
