"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ.setdefault("ACCELERATE_USE_CPU", "true")

import pytest
import torch

from tests.chaos.nursery import Nursery
from tests.process_pool import ProcessPool

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def processes() -> Iterator[ProcessPool]:
    """The processes of :func:`pool`."""
    made = ProcessPool()
    yield made
    made.close()


@pytest.fixture
def pool(processes: ProcessPool, request: pytest.FixtureRequest) -> Iterator[ProcessPool]:
    """Gloo processes, as many as a test needs: one where it is marked ``single``."""
    processes.most = 1 if request.node.get_closest_marker("single") else None
    yield processes
    processes.most = None


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    """Forks launchers with their ranks in a moment: importing torch in each would take seconds."""
    made = Nursery()
    yield made
    made.close()
