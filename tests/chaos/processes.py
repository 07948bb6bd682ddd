"""Processes as the system tells them."""

from __future__ import annotations

import ctypes
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from tests.chaos.setting import ROOT


class Process(NamedTuple):
    """An entry of /proc."""

    pid: int
    parent: int
    state: str


def processes() -> dict[int, Process]:
    """Return all processes of this machine."""
    found = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with suppress(OSError):
                words = Path(entry, "stat").read_text().rpartition(")")[2].split()
                found[int(entry.name)] = Process(int(entry.name), int(words[1]), words[0])
    return found


def descendants(everything: dict[int, Process], root: int, *, without: int) -> list[Process]:
    """Return the processes that stem from one, zombies left out."""
    found, known = [], {root}
    for _ in range(6):  # generations
        found = [p for p in everything.values() if p.parent in known and p.pid != without]
        known = {root, *(p.pid for p in found)}
    return sorted(p for p in found if p.state not in "ZX")


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent dies, so that none is lost sight of."""
    pr_set_child_subreaper = 36
    ctypes.CDLL(None).prctl(pr_set_child_subreaper, 1, 0, 0, 0)


def clean_environment(**added: str) -> dict[str, str]:
    """The environment of a user's shell on a machine without GPUs."""
    unwanted = ("ACCELERATE_", "WORLD_SIZE", "RANK", "LOCAL_", "MASTER_", "LOCKSTEP_", "SLURM_", "TORCHELASTIC_")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(unwanted)}
    return {
        **kept,
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONFAULTHANDLER": "1",
        "PYTHONPATH": str(ROOT),
        "WANDB_MODE": "offline",
        **added,
    }


def free_port() -> int:
    """Return a port of this machine that nobody uses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
