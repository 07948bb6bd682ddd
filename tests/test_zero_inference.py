"""A checkpoint of a sharded run is evaluated and predicted by ZeRO's processes as by one of ddp's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("deepspeed", reason="needs the extra deepspeed")

from tests.observed import configuration, observe
from tests.process_pool import ProcessPool
from tests.test_launch import clean_environment
from tests.test_zero import LONG, ROOT, zero


def trained(folder: Path, stage: int, **changes: Any) -> dict[str, Any]:
    """BatchNorm, dropout, an average, and a weight that is not trained."""
    return configuration(
        folder,
        **{
            "model": {"target": "tiny:Mlp", "args": {"dtype": "float32"}, "freeze": ["net.4.bias"]},
            "data": {"train": points(96), "validation": points(31), "test": points(31)},
            "optimizer": {"target": "AdamW", "args": {"lr": 0.01}},
            "averaging": {"decay": 0.5},
            "limit": {"steps": 4},
            "strategy": zero(stage),
            **changes,
        },
    )


def points(size: int) -> dict[str, Any]:
    return {"target": "tiny:points", "args": {"size": size, "dtype": "float32"}}


def evaluated(config: dict[str, Any], weights: Any) -> dict[str, Any]:
    from runtime.session import evaluate

    done = evaluate(config, weights=weights)
    assert done.weights == weights
    return dict(done.results)


def predicted(config: dict[str, Any], output: str, weights: Any) -> int:
    from runtime.session import predict

    return predict(config, output=output, weights=weights).samples


def rows_of(path: Path) -> list[list[float]]:
    lines = path.read_text().splitlines()
    return [[float(number) for number in line.split(",")] for line in lines[1:]]


# 31 samples are 8 microbatches of at most 4, or 3 of 13, and 1 is 1: in the last two the second rank has one less
SHARES = {"uneven": (31, 4), "one to spare": (31, 13), "fewer samples than ranks": (1, 4)}


@pytest.mark.parametrize(
    ("stage", "weights"),
    [
        (3, "averaged"),
        pytest.param(3, "raw", marks=LONG),
        pytest.param(2, "averaged", marks=LONG),
        pytest.param(1, "raw", marks=LONG),
    ],
)
def test_ranks_with_uneven_shares_give_the_figures_and_rows_of_one_process(
    pool: ProcessPool, tmp_path: Path, stage: int, weights: str
) -> None:
    pool.run(observe, 2, trained(tmp_path / "run", stage))
    for share, (size, micro_size) in SHARES.items():
        changes = {
            "data": {"train": points(96), "validation": points(size), "test": points(size)},
            "evaluation": {
                "every": "1000 steps",
                "micro_size": micro_size,
                "metrics": {"accuracy": {"target": "MulticlassAccuracy", "args": {"num_classes": 3}}},
            },
        }
        ours = trained(tmp_path / "run", stage, **changes)
        alone = {**ours, "strategy": {"kind": "ddp"}}
        expected = pool.run(evaluated, 1, alone, weights)[0]
        assert expected["samples"] == size
        files = {processes: tmp_path / f"{share}-{processes}.csv" for processes in (1, 2)}
        assert pool.run(predicted, 1, alone, str(files[1]), weights) == [size]
        assert pool.run(predicted, 2, ours, str(files[2]), weights) == [size, size]
        for got in pool.run(evaluated, 2, ours, weights):
            assert got == pytest.approx(expected, rel=1e-6)
        theirs, rows = rows_of(files[1]), rows_of(files[2])
        assert len(rows) == size
        for row, other in zip(rows, theirs, strict=True):
            assert row == pytest.approx(other, rel=1e-6, abs=1e-7)


@pytest.mark.long
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_commands_do_it_on_the_run_folder(pool: ProcessPool, tmp_path: Path, stage: int) -> None:
    config = trained(tmp_path / "run", stage)
    pool.run(observe, 2, config)
    expected = pool.run(evaluated, 1, {**config, "strategy": {"kind": "ddp"}}, "averaged")[0]
    for act, output in (("evaluate", tmp_path / "results.json"), ("predict", tmp_path / "rows.csv")):
        line = [
            sys.executable,
            "-m",
            "runtime.cli",
            act,
            str(tmp_path / "run"),
            "--processes",
            "2",
            "--output",
            str(output),
        ]
        done = subprocess.run(
            line, env=clean_environment(), cwd=ROOT, capture_output=True, text=True, timeout=240, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "results.json").read_text())["results"] == pytest.approx(expected, rel=1e-6)
    assert [row[0] for row in rows_of(tmp_path / "rows.csv")] == list(range(31))
