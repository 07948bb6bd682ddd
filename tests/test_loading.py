"""Loader workers live as long as the run, evaluation's too, and end with the process they read for, whenever it dies."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.data.loading import LastingLoader, loader_factory, read
from runtime.data.samples import Samples, SlotIndex
from runtime.errors import DataError
from tests.observed import configuration, observe
from tests.process_pool import ProcessPool
from tests.project.tiny import Ids
from tests.project.tiny_reading import Late
from tests.test_averaging import SWA
from tests.test_resumption import observe_stopping

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


def observe_workers(config: dict[str, Any], after: int | None) -> tuple[dict[str, Any], list[int], list[int]]:
    """Train, and return what happened, the loader workers that were started, and those that are left."""
    told = Path(config["output"]).with_suffix(f".workers-{os.environ.get('RANK', '0')}")
    os.environ["TINY_WORKERS"] = str(told)
    result = observe_stopping(config, after)
    started = [int(pid) for pid in told.read_text().split()]
    told.unlink()
    return result, started, [pid for pid in started if is_running(pid)]


def evaluated_often(folder: Path, num_workers: int, **changes: Any) -> dict[str, Any]:
    """Evaluates 8 times, at the end the test data as well. The checks of a first start would have workers of their own."""
    points = {"target": "tiny:points", "args": {"size": 40}}
    noting = {"worker_init": {"target": "tiny_reading:note_worker"}} if num_workers else {}
    loader = {"num_workers": num_workers, **noting}
    data = {"train": points, "validation": points, "test": points, "loader": loader}
    evaluation = {"every": "1 step", "micro_size": 7}
    return configuration(
        folder, **{"data": data, "limit": {"steps": 8}, "evaluation": evaluation, "checks": "off", **changes}
    )


@pytest.mark.parametrize(
    ("world_size", "changes", "loaders"),
    [
        pytest.param(1, {}, 3, marks=pytest.mark.single),
        pytest.param(1, {"averaging": {**SWA, "start": "2 steps", "every": "1 step"}}, 4, marks=pytest.mark.single),
        (2, {}, 3),
    ],
)
def test_workers_are_started_once_for_each_data_set_and_end_with_the_run(
    pool: ProcessPool, tmp_path: Path, world_size: int, changes: dict[str, Any], loaders: int
) -> None:
    """Training, validation and test; the statistics of an average are a pass of their own over the training data."""
    alone = pool.run(observe, 1, evaluated_often(tmp_path / "alone", 0, **changes))[0]
    config = evaluated_often(tmp_path / "workers", 2, **changes)
    for result, started, left in pool.run(observe_workers, world_size, config, None):
        assert len(set(started)) == 2 * loaders
        assert left == []
        assert result["results"] == pytest.approx(alone["results"], rel=1e-10)


@pytest.mark.single
def test_an_evaluation_that_is_cut_short_leaves_no_worker(pool: ProcessPool, tmp_path: Path) -> None:
    config = evaluated_often(tmp_path / "cut", 2)
    result, started, left = pool.run(observe_workers, 1, config, 5)[0]
    assert (result["outcome"], len(started), left) == ("stopped", 4, [])


@pytest.mark.single
def test_the_workers_of_the_checks_end_as_well(pool: ProcessPool, tmp_path: Path) -> None:
    config = evaluated_often(tmp_path, 2, checks="on", limit={"steps": 1})
    _, started, left = pool.run(observe_workers, 1, config, None)[0]
    assert len(set(started)) > 2 * 3
    assert left == []


def lasting(closing: ExitStack, samples: Any, **options: Any) -> Any:
    usual = {"num_workers": 2, "prefetch_factor": 2, "pin_memory": False, "timeout_seconds": 0, "start_method": None}
    make_loader = loader_factory(**{**usual, **options}, closing=closing)
    assert isinstance(make_loader, LastingLoader)
    return lambda *batches: read(samples, iter([SlotIndex(0, np.array(batch)) for batch in batches]), make_loader)


@pytest.mark.single
def test_a_pass_that_was_left_halfway_does_not_enter_the_next() -> None:
    with ExitStack() as closing:
        passes = lasting(closing, Samples(Ids(64), seed=0))
        assert next(passes(*([n] for n in range(20)))).tolist() == [0]
        for first in (30, 40):
            batches = [[first], [first + 1, first + 2], [first + 3]]
            assert [batch.tolist() for batch in passes(*batches)] == batches
        assert list(passes()) == []


@pytest.mark.single
def test_a_worker_that_dies_between_two_passes_is_a_lost_worker(pool: ProcessPool) -> None:
    pool.run(kill_between_passes, 1)


def kill_between_passes() -> None:
    with ExitStack() as closing:
        passes = lasting(closing, Samples(Ids(64), seed=0), num_workers=1)
        assert len(list(passes([0], [1]))) == 2
        for worker in multiprocessing.active_children():
            # Torch's signal handler raises wherever the main thread is when the worker ends, here as well.
            with suppress(RuntimeError):
                worker.kill()
            with suppress(RuntimeError):
                worker.join()
        with pytest.raises(DataError, match="a loader worker was lost"):
            list(passes([2]))


@pytest.mark.single
def test_a_loader_that_waits_too_long_says_for_how_long_and_which_key_helps() -> None:
    with ExitStack() as closing:
        passes = lasting(closing, Samples(Late(), seed=0), num_workers=1, timeout_seconds=1)
        with pytest.raises(
            DataError, match=r"data.loader.timeout_seconds: no loader worker returned a batch within 1 s.*raise it"
        ):
            list(passes([1, 2], [7]))
