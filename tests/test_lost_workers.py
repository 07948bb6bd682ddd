"""A loader worker that is killed is told as that, wherever torch's signal handler strikes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from runtime.data.loading import lost_worker
from runtime.errors import EvaluationError
from runtime.open_files import open_files_error
from tests.observed import configuration
from tests.test_launch import clean_environment

ROOT = Path(__file__).parent.parent
MODULE = '''
import multiprocessing, os, signal, time
import torch
from torch import nn
from torch.utils.data import Dataset


class Points(Dataset):
    def __len__(self):
        return 512

    def __getitem__(self, index):
        return torch.ones(8), index % 2


class Killing(nn.Module):
    """Kills a worker in the forward pass of the mode that is asked for, and waits in Python for the handler."""

    def __init__(self, where):
        super().__init__()
        self.layer, self.where, self.passes = nn.Linear(8, 2), where, 0

    def forward(self, x):
        self.passes += 1
        if self.where == ("training" if self.training else "evaluation") and self.passes > 1:
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                time.sleep(0.01)
        return self.layer(x)
'''


def ended(folder: Path, where: str, *, act: str = "train") -> subprocess.CompletedProcess[str]:
    (folder / "killing.py").write_text(MODULE)
    config: dict[str, Any] = configuration(
        folder / "run",
        code=str(folder),
        model={"target": "killing:Killing", "args": {"where": where}},
        data={
            "train": {"target": "killing:Points"},
            "validation": {"target": "killing:Points"},
            "loader": {"num_workers": 1, "prefetch_factor": 2},
        },
        limit={"steps": 4},
        evaluation={"every": "2 steps"},
        checks="off",
    )
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return subprocess.run(
        [sys.executable, str(ROOT / "runtime" / f"{act}.py"), str(folder / "run.yaml")],
        env=clean_environment(ACCELERATE_USE_CPU="true"),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.mark.parametrize("where", ["training", "evaluation"])
def test_a_worker_that_is_killed_is_told_without_a_traceback(tmp_path: Path, where: str) -> None:
    done = ended(tmp_path, where)
    assert done.returncode == 1
    assert "a loader worker was lost" in done.stderr
    assert "num_workers" in done.stderr
    assert "Traceback" not in done.stderr


def test_it_is_known_behind_what_other_code_makes_of_it() -> None:
    try:
        try:
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")
        except RuntimeError:
            raise EvaluationError("a metric refused its input")  # noqa: B904 - as code does that knows no better
    except EvaluationError as error:
        assert lost_worker(error) is not None
    assert lost_worker(RuntimeError("of the user's own")) is None


@pytest.mark.parametrize(
    "error",
    [
        OSError(24, os.strerror(24)),
        RuntimeError("Too many open files. Communication with the workers is no longer possible."),
        RuntimeError("received 0 items of ancdata"),
    ],
)
def test_too_many_open_files_are_told_with_the_limit(error: Exception) -> None:
    told = open_files_error(error)
    assert told is not None
    assert "ulimit -n" in str(told)
    assert open_files_error(OSError(2, os.strerror(2))) is None
