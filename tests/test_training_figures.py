"""The figures of training: of the update that they are told for, and of all steps since the last, whatever interrupted them."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.optim.optimizer import register_optimizer_step_pre_hook

from runtime.data.reading_ahead import summed_ahead
from tests.observed import configuration, observe
from tests.process_pool import ProcessPool
from tests.test_resumption import observe_stopping

TIMES = {"time", "samples_per_second", "tokens_per_second", "data_share", "peak_memory_bytes"} | {
    "slowest_rank",
    "slowest_rank_excess",
}


def told(folder: Path, event: str = "train") -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["event"] == event]


def figures(folder: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in record.items() if name not in TIMES} for record in told(folder)]


# Learning rates


def observe_rates(config: dict[str, Any]) -> list[list[float]]:
    noted: list[list[float]] = []
    hook = register_optimizer_step_pre_hook(
        lambda optimizer, *_: noted.append([float(group["lr"]) for group in optimizer.param_groups])
    )
    try:
        observe(config)
    finally:
        hook.remove()
    return noted


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.single), 2])
@pytest.mark.parametrize(
    ("optimizer", "names"),
    [
        (
            {"no_decay": True, "groups": [{"match": ["net.4.*"], "args": {"lr": 0.02}}]},
            ["groups.0", "groups.0, no decay", "all others", "no decay"],
        ),
        ({"groups": [{"match": ["net.4.weight"], "args": {"lr": 0.02}}]}, ["groups.0", "all others"]),
        ({}, []),
    ],
)
def test_each_report_has_the_rates_of_all_groups_with_which_its_update_was_made(
    pool: ProcessPool, tmp_path: Path, world_size: int, optimizer: dict[str, Any], names: list[str]
) -> None:
    args = {"target": "AdamW", "args": {"lr": 0.01, "weight_decay": 0.1}, **optimizer}
    config = configuration(
        tmp_path,
        optimizer=args,
        schedule={"target": "ExponentialLR", "args": {"gamma": 0.8}, "warmup_steps": 3},
        limit={"steps": 8},
        reporting={"every": "3 steps", "progress": False},
    )
    rates = pool.run(observe_rates, world_size, config)[0]
    assert len({rate for step in rates for rate in step}) >= 7
    reports = told(tmp_path)
    assert [report["step"] for report in reports] == [3, 6, 8]
    for report in reports:
        of_groups = [value for name, value in report.items() if name.startswith("learning_rate/")]
        assert report["learning_rate"] == rates[report["step"] - 1][0]
        if names:
            assert [name.removeprefix("learning_rate/") for name in report if "rate/" in name] == names
            assert of_groups == rates[report["step"] - 1]
        else:
            assert of_groups == []


@pytest.mark.single
def test_a_step_whose_update_was_left_out_has_no_norm_of_another_and_the_rate_it_would_have_had(
    pool: ProcessPool, tmp_path: Path
) -> None:
    config = configuration(
        tmp_path,
        model={"target": "tiny:Mlp", "args": {"dropout": 0.0}},
        objective={"target": "tiny_divergence:Astray", "args": {"dtype": "float64"}},
        schedule={"target": "ExponentialLR", "args": {"gamma": 0.5}},
        divergence={"non_finite": "skip"},
        limit={"steps": 12},
        reporting={"every": "3 steps", "progress": False},
        optimizer={"target": "SGD", "args": {"lr": 0.1}, "max_grad_norm": 1.0},
    )
    pool.run(observe, 1, config)
    from runtime.checkpoints.load import load_state

    skipped = load_state(tmp_path / "checkpoints" / "step-00000012")[1]["progress"]["skipped_steps"]
    assert any(step % 3 == 0 for step in skipped)
    for report in told(tmp_path):
        step = report["step"]
        assert ("grad_norm" in report) == (step not in skipped)
        applied_before = sum(other not in skipped for other in range(1, step))
        assert report["learning_rate"] == pytest.approx(0.1 * 0.5**applied_before, rel=1e-12)


# What was summed before a stop or a kill


def summing(folder: Path, **changes: Any) -> dict[str, Any]:
    """Reports every 5 of 11 steps: parts of the loss, and metrics of the training batches."""
    return configuration(
        folder,
        **{
            "model": {"target": "tiny:Mlp", "args": {"dropout": 0.0, "batch_norm": False}},
            "data": {"train": {"target": "tiny:points", "args": {"size": 75}}},
            "limit": {"steps": 11},
            "evaluation": {
                "metrics": {
                    "accuracy": {"target": "Accuracy", "args": {"task": "multiclass", "num_classes": 3}},
                    "auroc": {"target": "AUROC", "args": {"task": "multiclass", "num_classes": 3}},
                },
                "metrics_on_train": True,
            },
            "reporting": {"every": "5 steps", "progress": False},
            **changes,
        },
    )


SEVERAL = {
    "objective": {"losses": {"a": {"target": "CrossEntropyLoss"}, "b": {"target": "CrossEntropyLoss", "weight": 0.5}}},
}


@pytest.mark.parametrize(
    ("world_size", "stops", "changes"),
    [
        pytest.param(1, (3, 7, 9), {}, marks=pytest.mark.single),
        pytest.param(1, (1, 2, 6), SEVERAL, marks=pytest.mark.single),
        (2, (4, 8), {}),
        (2, (2, 9), {"model": {"target": "tiny:Mlp", "args": {"dropout": 0.0, "dtype": "float32", "batch_norm": False}},
                     "data": {"train": {"target": "tiny:points", "args": {"size": 75, "dtype": "float32"}}}}),
    ],
)  # fmt: skip
def test_a_report_covers_the_steps_before_an_interruption_bit_for_bit(
    pool: ProcessPool, tmp_path: Path, world_size: int, stops: tuple[int, ...], changes: dict[str, Any]
) -> None:
    pool.run(observe, world_size, summing(tmp_path / "whole", **changes))
    for after in (*stops, None):
        pool.run(observe_stopping, world_size, summing(tmp_path / "cut", **changes), after)
    assert [figure["step"] for figure in figures(tmp_path / "whole")] == [5, 10, 11]
    assert figures(tmp_path / "cut") == figures(tmp_path / "whole")


def test_a_report_covers_the_steps_that_other_numbers_of_processes_made(pool: ProcessPool, tmp_path: Path) -> None:
    pool.run(observe, 1, summing(tmp_path / "whole"))
    for world_size, after in ((2, 2), (1, 3), (3, 6), (2, 7), (1, None)):
        pool.run(observe_stopping, world_size, summing(tmp_path / "cut"), after)
    for report, expected in zip(figures(tmp_path / "cut"), figures(tmp_path / "whole"), strict=True):
        assert report.pop("event") == expected.pop("event")
        assert report == pytest.approx(expected, rel=1e-9)


@pytest.mark.single
def test_metrics_that_were_changed_meanwhile_begin_anew(pool: ProcessPool, tmp_path: Path) -> None:
    pool.run(observe_stopping, 1, summing(tmp_path), 3)
    changed = summing(tmp_path)
    changed["evaluation"]["metrics"] = {
        "top2": {"target": "Accuracy", "args": {"task": "multiclass", "num_classes": 3, "top_k": 2}}
    }
    pool.run(observe, 1, changed)
    assert set(figures(tmp_path)[0]) >= {"loss", "top2"}


# Throughput, and who holds the others up


class Clock:
    """Goes on while the run's data is read, and a little whenever it is asked."""

    ticks = itertools.count()

    @classmethod
    def perf_counter(cls) -> float:
        read = getattr(sys.modules.get("tiny_reading"), "SECONDS", {"now": 0.0})["now"]
        return float(read) + 1e-4 * next(cls.ticks)

    monotonic = perf_counter


def observe_clocked(config: dict[str, Any]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("runtime.reporting.meters.time", Clock)
        patch.setattr("runtime.distributed.collectives.time", Clock)
        observe(config)


def clocked(folder: Path, target: str, every: int, **args: Any) -> dict[str, Any]:
    """More samples than 15 steps of 12 need, and than are read ahead of them."""
    shared = {"sharded_by": "runtime"} if target == "ClockedStream" else {}
    return configuration(
        folder,
        data={"train": {"target": f"tiny_reading:{target}", "args": {"size": 300, **args}, **shared}},
        batch={"global_size": 12, "slots": 6},
        limit={"steps": 15},
        reporting={"every": f"{every} steps", "progress": False},
    )


@pytest.mark.parametrize(("world_size", "slow_on"), [(2, 0), (3, 1)])
@pytest.mark.parametrize("target", ["Clocked", "ClockedStream"])
@pytest.mark.parametrize("every", [1, 3])
def test_every_report_names_the_rank_that_reads_slowly(
    pool: ProcessPool, tmp_path: Path, world_size: int, slow_on: int, target: str, every: int
) -> None:
    pool.run(observe_clocked, world_size, clocked(tmp_path, target, every, slow_on=slow_on))
    reports = told(tmp_path)
    assert [report["step"] for report in reports] == list(range(every, 16, every))
    assert {report["slowest_rank"] for report in reports} == {slow_on}
    assert all(report["slowest_rank_excess"] > 0.2 for report in reports)
    messages = [record["text"] for record in told(tmp_path, "message") if " is the slowest" in record["text"]]
    assert [text.partition(" is the slowest")[0] for text in messages] == [f"rank {slow_on}"]


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.single), 2])
@pytest.mark.parametrize("target", ["Clocked", "ClockedStream"])
def test_throughput_is_the_same_in_every_report(
    pool: ProcessPool, tmp_path: Path, world_size: int, target: str
) -> None:
    pool.run(observe_clocked, world_size, clocked(tmp_path, target, 1, slow_on=0))
    rates = [report["samples_per_second"] for report in told(tmp_path)]
    assert rates[1:] == pytest.approx([rates[1]] * 14, rel=0.05)
    first = 1 if target == "Clocked" else 3  # a stream's first step reads the two batches behind it as well
    assert rates[1] / first * 0.95 < rates[0] < rates[1] * 1.05


@pytest.mark.parametrize("ahead", [1, 2, 8])
@pytest.mark.single
def test_between_two_steps_at_most_two_are_read_and_sums_are_begun_half_a_block_before_they_are_needed(
    ahead: int,
) -> None:
    read: list[int] = []
    begun: dict[int, int] = {}
    growing = [False]

    def rows() -> Iterator[int]:
        for number in range(100):
            read.append(number)
            yield number

    def begin(block: list[int]) -> Callable[[], list[int]]:
        begun.update(dict.fromkeys(block, len(steps)))
        return lambda: block

    steps: list[int] = []
    before = 0
    for row in summed_ahead(rows(), begin, lambda: ahead if growing[0] else 1):
        growing[0] = True
        if len(steps) > 4:
            assert len(read) - before <= 2
        else:
            assert len(read) - before <= 4
        before = len(read)
        assert len(read) <= len(steps) + max(1, ahead + ahead // 2)
        steps.append(row)
    assert steps == list(range(100))
    late = [row for row in steps[40:] if begun[row] > row - ahead // 2]
    assert not late


# The table at the end


def table(folder: Path, capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in row.strip("│").split("│")] for row in rows]


@pytest.mark.single
def test_the_table_has_the_rows_of_earlier_starts_and_says_of_which_step_a_training_loss_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {
        "data": {"train": "tiny:points", "validation": {"target": "tiny:points", "args": {"size": 30}}},
        "evaluation": {"every": "2 steps"},
        "reporting": {"every": "3 steps", "progress": False},
    }
    for steps in (4, 8, 8):
        capsys.readouterr()
        observe(configuration(tmp_path, limit={"steps": steps}, **changes))
    losses = {record["step"]: f"{record['loss']:.4f}" for record in told(tmp_path)}
    results = {record["step"]: f"{record['loss']:.4f}" for record in told(tmp_path, "evaluation")}
    assert table(tmp_path, capsys) == [
        ["validation", "1", "2", "", results[2]],
        ["validation", "1", "4", losses[4], results[4]],
        ["validation", "1", "6", losses[6], results[6]],
        ["validation", "2", "8", losses[8], results[8]],
    ]
    assert sorted(losses) == [3, 4, 6, 8]
    observe(
        configuration(
            tmp_path,
            limit={"steps": 100},
            **{**changes, "evaluation": {"every": "100 steps"}, "reporting": {"every": "99 steps", "progress": False}},
        )
    )
    rows = table(tmp_path, capsys)
    assert len(rows) == 5
    assert rows[-1][2:4] == ["100", f"{told(tmp_path)[-1]['loss']:.4f}"]
