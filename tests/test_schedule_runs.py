"""Schedules within runs: stepped once whatever the number of ranks, never for a skipped update; and shown before a run."""

from __future__ import annotations

import builtins
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from torch.optim import SGD, lr_scheduler

from runtime.checkpoints.load import load_state
from runtime.cli import main
from runtime.commands.learning_rate_curve import drawn
from runtime.optimization.planned_rates import PlannedRates, simulate
from runtime.optimization.schedule import Schedule
from tests.observed import assert_bitwise_equal, configuration, largest_difference, observe
from tests.process_pool import ProcessPool
from tests.test_resumption import observe_stopping


def records(folder: Path, event: str) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["event"] == event]


def rates(folder: Path) -> list[float]:
    """The rate of the update that each report is about."""
    return [record["learning_rate"] for record in records(folder, "train")]


def plateau(folder: Path) -> dict[str, Any]:
    args = {"factor": 0.5, "patience": 0, "threshold": 0.05, "cooldown": 1}
    return configuration(
        folder,
        model={"target": "tiny:Mlp", "args": {"dropout": 0.0}},
        data={"train": {"target": "tiny:points", "args": {}}, "validation": "tiny:points"},
        batch={"global_size": 16, "slots": 5},
        schedule={"target": "ReduceLROnPlateau", "args": args, "monitor": "loss", "warmup_steps": 2},
        optimizer={"target": "SGD", "args": {"lr": 0.5, "momentum": 0.9}},
        evaluation={"every": "2 steps", "micro_size": 7},
        limit={"steps": 20},
    )


def test_a_plateau_is_found_alike_on_any_number_of_ranks_and_as_torch_does(pool: ProcessPool, tmp_path: Path) -> None:
    one = pool.run(observe, 1, plateau(tmp_path / "1"))[0]
    alone = SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    by_torch = lr_scheduler.ReduceLROnPlateau(alone, factor=0.5, patience=0, threshold=0.05, cooldown=1)
    losses = {record["step"]: record["loss"] for record in records(tmp_path / "1", "evaluation")}
    expected = []
    for step in range(1, 21):  # the report of a step comes before its evaluation
        expected.append(alone.param_groups[0]["lr"])
        if step in losses:
            by_torch.step(losses[step])
    assert rates(tmp_path / "1") == pytest.approx([expected[0] / 2, *expected[1:]], rel=1e-12)  # the warm-up's first
    assert len(set(expected)) > 2
    several = pool.run(observe, 2, plateau(tmp_path / "2"))
    assert largest_difference(one, several[0]) < 1e-10
    assert rates(tmp_path / "2") == rates(tmp_path / "1")
    assert_bitwise_equal(several[0], several[1])


def test_a_plateau_goes_on_after_a_resume(pool: ProcessPool, tmp_path: Path) -> None:
    whole = pool.run(observe, 2, plateau(tmp_path / "whole"))[0]
    for after in (7, 13):
        pool.run(observe_stopping, 2, plateau(tmp_path / "resumed"), after)
    assert_bitwise_equal(whole, pool.run(observe, 2, plateau(tmp_path / "resumed"))[0])
    assert rates(tmp_path / "resumed") == rates(tmp_path / "whole")


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_a_scheduler_is_stepped_once_per_applied_update_or_epoch(
    pool: ProcessPool, tmp_path: Path, world_size: int, interval: str
) -> None:
    """Not once per rank, per microbatch, or for an update that was skipped."""
    config = configuration(
        tmp_path,
        model={"target": "tiny:Mlp", "args": {"dropout": 0.0}},
        objective={"target": "tiny_divergence:Astray", "args": {"dtype": "float64"}},
        schedule={"target": "ExponentialLR", "args": {"gamma": 0.9}, "interval": interval, "warmup_steps": 2},
        divergence={"non_finite": "skip"},
        limit={"epochs": 2},
    )
    for reply in pool.run(observe, world_size, config):
        assert reply["step"] == 12
    state = load_state(tmp_path / "checkpoints" / "step-00000012")[1]
    skipped = set(state["progress"]["skipped_steps"])
    assert skipped
    expected, updates, stepped = [], 0, 0
    for step in range(1, 13):
        expected.append(0.1 * 0.9**stepped * min(1.0, (updates + 1) / 2))
        counts = updates >= 2
        updates += step not in skipped
        stepped += counts and step not in skipped if interval == "step" else step % 6 == 0
    assert rates(tmp_path) == pytest.approx(expected, rel=1e-12)


def dots(lines: list[str], height: int) -> dict[int, list[int]]:
    """Read the rows of the dots in each column of a drawing."""
    found: dict[int, list[int]] = {}
    places = (
        (0x01, 0, 0),
        (0x02, 1, 0),
        (0x04, 2, 0),
        (0x40, 3, 0),
        (0x08, 0, 1),
        (0x10, 1, 1),
        (0x20, 2, 1),
        (0x80, 3, 1),
    )
    for number, line in enumerate(lines[:height]):
        drawing = line.replace("│", "┤").partition("┤")[2]
        for column, character in enumerate(drawing):
            bits = ord(character) - 0x2800 if character != " " else 0
            for bit, row, side in places:
                if bits & bit:
                    found.setdefault(2 * column + side, []).append(4 * number + row)
    return found


@pytest.mark.parametrize("steps", [3, 40, 80, 1000])
def test_the_drawing_passes_through_every_rate(steps: int) -> None:
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = Schedule(optimizer, lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - 1)), warmup_steps=1)
    curve = simulate(schedule, steps=steps, steps_per_epoch=10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
    lines = list(drawn(curve, width=20, height=5))
    columns = dots(lines, 5)
    assert sorted(columns) == list(range(40))
    for column, rows in columns.items():
        span = curve.rates[0][column * steps // 40 : max(column * steps // 40 + 1, (column + 1) * steps // 40)]
        for rate in span:
            row = (1 - rate / 2.0) * 19  # 20 rows of dots, from 2.0 down to 0
            assert min(rows) - 0.51 <= row <= max(rows) + 0.51
    assert lines[0].split()[0] == "2"
    assert lines[4].split()[0] == "0"
    assert lines[-1].split()[0] == "1"
    assert lines[-1].endswith(f"{steps:,} steps")


def test_groups_of_equal_rates_are_one_curve() -> None:
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in (0.1, 0.2, 0.1)]
    curve = simulate(Schedule(SGD(groups), warmup_steps=2), steps=3, steps_per_epoch=1)
    assert curve == PlannedRates(3, [[0.05, 0.1, 0.1], [0.1, 0.2, 0.2]], [2, 1])


def page(folder: Path, **changes: Any) -> Path:
    config = {
        **configuration(folder / "run"),
        "schedule": {"target": "StepLR", "args": {"step_size": 2}, "interval": "epoch", "warmup_steps": 3},
        "limit": {"epochs": 5},
        **changes,
    }
    path = folder / "c.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def shown(path: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert main(["show", str(path), *options]) == 0
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, ["StepLR, stepped after each epoch after a linear warm-up of 3 updates", "last 0.001", "┤", "30 steps"]),
        ({"schedule": {"target": "ConstantLR"}}, ["ConstantLR, stepped after each applied update"]),
        ({"schedule": None}, ["learning rate constant first 0.1, last 0.1"]),
        (
            {
                "schedule": {"target": "ReduceLROnPlateau", "monitor": "loss"},
                "data": {"train": "tiny:points", "validation": "tiny:points"},
            },
            ["ReduceLROnPlateau, stepped after each evaluation", "as if loss never stopped improving"],
        ),
        (
            {"averaging": {"kind": "swa", "start": "2 epochs", "learning_rate": 0.05, "anneal": {"steps": 6}}},
            [
                "after 2 epochs: to 0.05 over 6 updates (cos)",
                "last 0.05",
                "mean of the weights after each epoch, from epoch 3 on",
                "BatchNorm statistics need a forward pass over the training data, before each evaluation",
            ],
        ),
        ({"averaging": {"decay": 0.9}}, ["exponential average (decay 0.9) after each update; it is evaluated"]),
    ],
)
def test_show_says_what_a_schedule_counts_and_draws_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], words: list[str]
) -> None:
    text = shown(page(tmp_path, **changes), capsys)
    for word in words:
        assert word in text, (word, text)


def test_the_curve_is_drawn_to_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    for name in ("curve.png", "curve.svg"):
        assert name in shown(page(tmp_path), capsys, "--curve", str(tmp_path / name))
    picture = imread(tmp_path / "curve.png")
    assert picture.shape[:2] == (600, 1200)
    assert picture[..., :3].std() > 0.05
    assert "learning rate" in (tmp_path / "curve.svg").read_text()


def test_a_picture_that_cannot_be_drawn_is_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = page(tmp_path)
    assert main(["show", str(path), "--curve", str(tmp_path / "curve.txt")]) == 2
    assert "curve.txt must end in .png" in capsys.readouterr().err
    imported = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["show", str(path), "--curve", str(tmp_path / "curve.png")]) == 2
    assert "pip install 'lockstep-train[plots]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("schedule", "key", "words"),
    [
        ({"target": "ReduceLROnPlateau", "monitor": "loss", "interval": "epoch"}, "schedule.interval", "evaluations"),
        ({"warmup_steps": 3, "interval": "epoch"}, "schedule.interval", "leave 'interval' out"),
        ({"target": "OneCycleLR", "args": {"max_lr": 1, "total_steps": 20}}, "schedule.args", "ends after 20 steps"),
        ({"target": "LambdaLR", "args": {"lr_lambda": "lambda i: i"}}, "lr_lambda", "text is not evaluated"),
        ({"target": "tiny_schedules:hidden"}, "schedule.target", "ends in ReduceLROnPlateau"),
        ({"target": "ChainedScheduler", "args": {"schedulers": [{"target": "XLR"}]}}, "schedulers.0.target", "XLR"),
    ],
)
def test_a_schedule_that_cannot_do_what_it_says_is_a_mistake(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], schedule: dict[str, Any], key: str, words: str
) -> None:
    data = {"train": {"target": "tiny:points"}, "validation": {"target": "tiny:points"}}
    assert main(["show", str(page(tmp_path, schedule=schedule, data=data))]) == 2
    error = capsys.readouterr().err
    assert key in error
    assert words in error
