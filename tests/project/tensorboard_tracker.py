"""The recipe for a tracker: this file, and one row in the YAML, ``reporting.trackers: [tensorboard_tracker:TensorBoard]``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lockstep import TrackedRun, Tracker


class TensorBoard(Tracker):
    """Writes a run's figures to ``tensorboard/`` in the run folder: ``tensorboard --logdir runs``."""

    def start(self, run: TrackedRun) -> None:
        self._folder = run.folder / "tensorboard"
        self._open(run.step)

    def log_summary(self, values: Mapping[str, Any]) -> None:
        self._writer.add_text("run", json.dumps(dict(values), indent=1))

    def log(self, values: Mapping[str, Any], *, step: int, epoch: int, split: str) -> None:
        for name, value in values.items():
            if isinstance(value, float):
                self._writer.add_scalar(f"{split}/{name}", value, step)

    def log_figure(self, name: str, path: Path, *, step: int, split: str) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        self._writer.add_image(f"{split}/{name}", pixels, step, dataformats="HWC")

    def rewind(self, step: int) -> None:
        self._writer.close()
        self._open(step)

    def finish(self, outcome: str) -> None:
        self._writer.close()

    def _open(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(
            str(self._folder), purge_step=step + 1
        )  # what an earlier start wrote of later steps
