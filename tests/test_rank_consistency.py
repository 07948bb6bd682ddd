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
    from runtime.reporting.facts import versions

    with pytest.MonkeyPatch.context() as patch:
        if os.environ["RANK"] == "1":
            config = {**config, **changes}
            if patched_version:
                patch.setattr("runtime.build.preparation.versions", lambda: {**versions(), "torch": "1.0"})
        try:
            observe(config)
        except RanksDifferError as error:
            return str(error)
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


def imported_by_rank_1_alone(config: dict[str, Any], *, changed: bool) -> str:
    """Train with another module imported on rank 1 only, or with another content of one that both have."""
    from runtime.code_digests import loaded_code

    def seen(*given: Any) -> dict[str, Any]:
        found = loaded_code(*given)
        if os.environ["RANK"] == "1":
            files = dict.fromkeys(found["files"], "0" * 16) if changed else {**found["files"], "drawing.py": "1" * 16}
            return {**found, "files": files}
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("runtime.build.preparation.loaded_code", seen)
        try:
            observe(config)
        except RanksDifferError as error:
            return str(error)
    return "trained"


def test_a_module_that_one_rank_alone_imported_is_no_difference(pool: ProcessPool, tmp_path: Path) -> None:
    config = configuration(tmp_path, limit={"steps": 1})
    assert pool.run(imported_by_rank_1_alone, 2, config, changed=False) == ["trained"] * 2


def test_a_module_of_another_content_is_named(pool: ProcessPool, tmp_path: Path) -> None:
    config = configuration(tmp_path, limit={"steps": 1})
    for reply in pool.run(imported_by_rank_1_alone, 2, config, changed=True):
        assert "has the code of tiny.py '0000000000000000', rank 0" in reply
