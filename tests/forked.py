"""Launches that take a moment: a launcher and ranks forked from a process that has imported torch (tests/chaos/nursery.py)."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import yaml

from tests.chaos.nursery import Nursery
from tests.chaos.processes import processes

_PATIENCE_SECONDS = 240.0


class Forked:
    """One launch of the run that ``FOLDER/config.yaml`` describes, whose folder is ``FOLDER/run``.

    Args:
        place: of this host among several, see the nursery.
    """

    def __init__(self, nursery: Nursery, folder: Path, config: dict[str, Any], world_size: int, **place: Any) -> None:
        self._folder, self._log = folder, folder / f"log-{place.get('host', 'all')}.txt"
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        self._first = min(place.get("own", [0]))
        self._pid = nursery.start(folder / "config.yaml", world_size, self._log, **place)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for pid in [*self.ranks().values(), self._pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def ranks(self) -> dict[int, int]:
        """Return rank to process id; complete only while all live."""
        found = sorted(p.pid for p in processes().values() if p.parent == self._pid and p.state not in "ZX")
        return dict(enumerate(found, start=self._first))

    @property
    def alive(self) -> bool:
        """Tell whether the launcher lives."""
        return self._pid in (found := processes()) and found[self._pid].state not in "ZX"

    def told(self) -> str:
        """Return what all processes have said."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def outcome(self) -> dict[str, Any]:
        """Return the content of ``outcome.json``."""
        return dict(json.loads((self._folder / "run" / "outcome.json").read_text()))

    def wait_for_step(self, step: int) -> None:
        """Wait until the run has reported a step."""
        records = self._folder / "run" / "metrics.jsonl"
        self.wait(lambda: records.exists() and f'"step": {step},' in records.read_text())

    def wait_for_end(self, *pids: int) -> None:
        """Wait until processes have gone; by default the launcher, which goes last."""
        wanted = pids or (self._pid,)
        self.wait(lambda: not any(p.pid in wanted and p.state not in "ZX" for p in processes().values()), alive=False)

    def wait(self, condition: Callable[[], bool], *, alive: bool = True) -> None:
        """Wait for a condition, while the launch lives or until it ends."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not condition():
            assert time.monotonic() < deadline, self.told()
            assert self.alive or not alive, self.told()
            time.sleep(0.02)
