"""Ranks that were not started alike are refused before the first step, by name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from runtime.errors import RanksDifferError
from tests.observed import configuration, observe
from tests.process_pool import ProcessPool


def started_otherwise(config: dict[str, Any], changes: dict[str, Any], patched_version: bool = False) -> str:
    from runtime import preparation

    versions = preparation.versions
    if os.environ["RANK"] == "1":
        config = {**config, **changes}
        if patched_version:
            preparation.versions = lambda: {**versions(), "torch": "1.0"}
    try:
        observe(config)
    except RanksDifferError as error:
        return str(error)
    finally:
        preparation.versions = versions
    return "trained"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"optimizer": {"target": "SGD", "args": {"lr": 0.2, "momentum": 0.9}}}, "configuration optimizer.args.lr 0.2"),
        ({"seed": 1}, "configuration seed 1"),
        ({"evaluation": {"every": "3 steps"}}, "configuration evaluation.every '3 steps'"),
        ({"data": {"train": {"target": "tiny:points", "args": {"size": 95}}}}, "has data {'samples': 95"),
        ({"model": {"target": "tiny:Mlp", "args": {"width": 17}}}, "has parameter shapes"),
    ],
    ids=["learning rate", "seed", "interval", "data", "model"],
)
def test_a_rank_that_was_started_otherwise_is_named(
    pool: ProcessPool, tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    replies = pool.run(started_otherwise, 2, configuration(tmp_path / "run"), changes)
    assert replies[0] == replies[1]
    assert "rank 1 (host " in replies[0]
    assert told in replies[0]
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_rank_with_another_version_of_torch_is_named(pool: ProcessPool, tmp_path: Path) -> None:
    replies = pool.run(started_otherwise, 3, configuration(tmp_path / "run"), {}, patched_version=True)
    assert "has torch '1.0', rank 0" in replies[2]


def test_what_does_not_change_the_result_may_differ(pool: ProcessPool, tmp_path: Path) -> None:
    changes = {"data": {"train": {"target": "tiny:points", "args": {}}, "loader": {"num_workers": 1}}}
    assert pool.run(started_otherwise, 2, configuration(tmp_path / "run"), changes) == ["trained", "trained"]
