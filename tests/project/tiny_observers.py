"""Observers of a user's, kept apart from the tests: a run imports them by name."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

import lockstep


class Notes:
    """Writes the number of each step, and what it is called, to a file of its rank."""

    def __init__(self, folder: str, name: str) -> None:
        self._folder, self._name = Path(folder), name

    def __call__(self, report: lockstep.StepReport) -> None:
        with (self._folder / f"rank-{report.rank}").open("a") as file:
            file.write(f"{self._name} {report.step}\n")


def meddling(report: Any) -> None:
    """Do what an observer can do: draw random numbers, and write into what it was given."""
    torch.rand(3)
    report.figures["loss"] = 0.0
    report.results.clear()


def failing(report: lockstep.StepReport) -> None:
    if report.step == 2 and report.rank == 1:
        raise KeyError("no such column")


class Hold:
    """Waits after a step while a file exists."""

    def __init__(self, file: str, step: int) -> None:
        self._file, self._step = Path(file), step

    def __call__(self, report: lockstep.StepReport) -> None:
        while report.step == self._step and self._file.exists():
            time.sleep(0.05)
