"""Loader workers end with the process they read for, whenever it dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

RANK = """
import os, sys, time
from pathlib import Path
from torch.utils.data import TensorDataset
import torch
from runtime.data.loading import loader_factory

def late(worker):
    parent = os.getppid()
    Path(sys.argv[1]).write_text(str(os.getpid()))
    while os.getppid() == parent:  # until it is killed
        time.sleep(0.01)

loader = loader_factory(
    num_workers=1, prefetch_factor=2, pin_memory=False, timeout_seconds=0, start_method=None, worker_init=late
)
next(iter(loader(TensorDataset(torch.zeros(4)), batch_sampler=iter([[0, 1]]))))
"""


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_worker_whose_parent_dies_while_it_starts_does_not_stay(tmp_path: Path) -> None:
    told = tmp_path / "worker"
    rank = subprocess.Popen([sys.executable, "-c", RANK, str(told)])
    until = time.monotonic() + 240
    while not (told.exists() and told.read_text()) and time.monotonic() < until and rank.poll() is None:
        time.sleep(0.02)
    worker = int(told.read_text())
    assert is_running(worker)
    rank.kill()
    rank.wait()
    while is_running(worker) and time.monotonic() < until:
        time.sleep(0.02)
    left = is_running(worker)
    if left:
        os.kill(worker, signal.SIGKILL)
    assert not left
