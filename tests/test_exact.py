"""``determinism: exact``: the same bits on any number of processes, in the whole record and in the digests of all states."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.determinism import determinism
from runtime.errors import ConfigurationError
from tests.observed import assert_bitwise_equal, configuration, observe
from tests.process_pool import ProcessPool
from tests.random_runs import can_be_sharded, random_run, record_of, sharded

RUNS, LONG_RUNS = 60, 500


def train_all(configs: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Train runs one after another, and return their records."""
    from runtime.session import train

    return [record_of(train(config).folder) for config in configs]


def records(
    pool: ProcessPool, folder: Path, seeds: Sequence[int], world_size: int, *, kind: str
) -> list[list[dict[str, Any]]]:
    """Train each run with ddp or fsdp, and with fsdp on four processes as two replicas."""
    configs = [random_run(seed, folder / f"{kind}-{world_size}-{seed}") for seed in seeds]
    if kind == "fsdp":
        configs = [sharded(config, replicas=2 if world_size == 4 else 1) for config in configs]
    return pool.run(train_all, world_size, configs)[0]


def compare(
    pool: ProcessPool, folder: Path, seeds: Sequence[int], others: Mapping[tuple[str, int], Sequence[int]]
) -> None:
    """Compare runs on one process with the same runs elsewhere.

    Args:
        others: strategy and number of processes to the seeds of the runs there.
    """
    alone = dict(zip(seeds, records(pool, folder, seeds, 1, kind="ddp"), strict=True))
    assert all(sorted(digests(record)) == [4, 8, 12] for record in alone.values())
    for (kind, world_size), chosen in others.items():
        possible = [seed for seed in chosen if kind == "ddp" or can_be_sharded(random_run(seed, folder))]
        for seed, found in zip(possible, records(pool, folder, possible, world_size, kind=kind), strict=True):
            same = (figures(found), digests(found)) == (figures(alone[seed]), digests(alone[seed]))
            assert same, f"seed {seed} with {kind} on {world_size}: {json.dumps(random_run(seed, folder))}"


@pytest.mark.parametrize("first", range(0, RUNS, 10))
def test_random_runs_are_the_same_bits_on_1_to_4_processes(pool: ProcessPool, tmp_path: Path, first: int) -> None:
    """Each run on one process and in one of six other ways; the long test has all ways."""
    seeds = range(first, first + 10)
    ways = [(kind, world_size) for world_size in (2, 3, 4) for kind in ("ddp", "fsdp")]
    compare(pool, tmp_path, seeds, {way: [s for s in seeds if ways[s % 6] == way] for way in ways})


@pytest.mark.long
@pytest.mark.parametrize("first", range(1000, 1000 + LONG_RUNS, 20))
def test_many_random_runs_are_the_same_bits_in_every_way(pool: ProcessPool, tmp_path: Path, first: int) -> None:
    seeds = range(first, first + 20)
    ways = [("fsdp", 1), *((kind, world_size) for world_size in (2, 3, 4) for kind in ("ddp", "fsdp"))]
    compare(pool, tmp_path, seeds, dict.fromkeys(ways, seeds))


def train_until(config: dict[str, Any], after: int | None) -> Any:
    """Train, asked to stop after a step, and return the record so far."""
    from tests.test_resumption import observe_stopping

    observe_stopping(config, after)
    return record_of(Path(config["output"]))


@pytest.mark.parametrize("seed", range(200, 206))
def test_a_run_that_goes_on_with_other_numbers_of_processes_is_the_same_bits(
    pool: ProcessPool, tmp_path: Path, seed: int
) -> None:
    expected = pool.run(train_until, 1, random_run(seed, tmp_path / "alone"), None)[0]
    config = random_run(seed, tmp_path / "moved")
    pool.run(train_until, 2, config, 2 + seed % 5)
    between = sharded(config) if can_be_sharded(config) else config
    pool.run(train_until, 1 + 2 * (seed % 2), between, 8)
    found = pool.run(train_until, 2, config, None)[0]
    assert figures(found) == figures(expected)
    assert digests(expected).items() <= digests(found).items()


@pytest.mark.single
@pytest.mark.parametrize(
    ("before", "after", "warning"),
    [
        ("strict", "exact", "the first 8 steps were not made with determinism: exact"),
        ("exact", "strict", "the first 8 steps were made with determinism: exact, the next are not"),
        ("exact", "exact", None),
    ],
)
def test_a_run_that_changes_between_exact_and_strict_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], before: str, after: str, warning: str | None
) -> None:
    config = random_run(3, tmp_path / "run") | {"data": {"train": {"target": "tiny_exact:samples"}}}
    config |= {
        "model": {"target": "tiny_exact:Normed"},
        "objective": "CrossEntropyLoss",
        "evaluation": {},
        "schedule": None,
    }
    train_all([config | {"determinism": before, "limit": {"steps": 8}}])
    capsys.readouterr()
    train_all([config | {"determinism": after}])
    told = " ".join(capsys.readouterr().out.split())
    assert (warning or "run 1 process") in told
    assert ("made with determinism" in told) == (warning is not None)


def figures(record: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in record if line["event"] != "checkpoint"]


def digests(record: list[dict[str, Any]]) -> dict[int, str]:
    """By step; a checkpoint's line follows when it is on disk, so its place among the others is not fixed."""
    return {line["step"]: line["digest"] for line in record if line["event"] == "checkpoint"}


def test_ranks_whose_models_are_built_differently_begin_with_rank_0s(pool: ProcessPool, tmp_path: Path) -> None:
    config = random_run(1, tmp_path / "run")
    config["model"] = {"target": "tiny_exact:Unseeded"}
    config["data"] = {"train": {"target": "tiny_exact:samples", "args": {"kind": "classes"}}}
    config |= {"objective": "CrossEntropyLoss", "evaluation": {}, "checks": "on"}
    config.pop("schedule", None)
    first, second = pool.run(observe, 2, config)
    assert_bitwise_equal(first, second)


@pytest.mark.single
@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"strategy": {"kind": "zero"}}, "determinism"),
        ({"strategy": {"ddp": {"communication_hook": "fp16"}}}, "strategy.ddp.communication_hook"),
        ({"batch_norm": "sync"}, "batch_norm"),
        ({"data": {"train": {"target": "tiny_exact:Stream", "sharded_by": "dataset"}}}, "data.train.sharded_by"),
    ],
)
def test_what_depends_on_the_number_of_processes_is_refused(tmp_path: Path, changes: dict[str, Any], key: str) -> None:
    from runtime.config.file import load

    with pytest.raises(ConfigurationError, match=key.replace(".", r"\.")):
        load(configuration(tmp_path, determinism="exact", **changes))


@pytest.mark.single
def test_exact_runs_on_one_thread_and_gives_the_others_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with determinism("exact", "highest"):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3
        with determinism("strict", "highest"):
            assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
