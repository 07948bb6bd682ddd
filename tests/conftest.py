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
def pool() -> Iterator[ProcessPool]:
    """Gloo processes, as many as a test needs."""
    made = ProcessPool()
    yield made
    made.close()


@pytest.fixture(autouse=True)
def one_process_where_marked(request: pytest.FixtureRequest) -> Iterator[None]:
    """Hold tests marked ``single`` to what the mark says."""
    if "pool" not in request.fixturenames or request.node.get_closest_marker("single") is None:
        yield
        return
    pool: ProcessPool = request.getfixturevalue("pool")
    pool.most = 1
    yield
    pool.most = None


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    """Forks launchers with their ranks in a moment: importing torch in each would take seconds."""
    made = Nursery()
    yield made
    made.close()
