"""FSDP2: the same answer as DistributedDataParallel, from a part of the state on each rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.checkpoints.checkpoint import load_state
from tests.observed import assert_bitwise_equal, configuration, largest_difference, observe
from tests.process_pool import ProcessPool
from tests.test_resumption import observe_stopping


def gpt(folder: Path, kind: str = "fsdp", **changes: Any) -> dict[str, Any]:
    """A GPT in float64 on sentences of very uneven length, some without any target; three slots a rank on two ranks."""
    sharded = {"kind": kind, "fsdp": {"wrap": ["Block"]}}
    return configuration(
        folder,
        **{
            "model": {"target": "tiny_sharded:Gpt", "args": {}},
            "data": {"train": {"target": "tiny_sharded:sentences", "args": {}}},
            "batch": {"global_size": 7, "slots": 5},
            "objective": "CrossEntropyLoss",
            "optimizer": {"target": "AdamW", "args": {"lr": 0.01, "weight_decay": 0.1}, "max_grad_norm": 1.0},
            "limit": {"steps": 20},
            "strategy": sharded if kind == "fsdp" else {"kind": kind},
            **changes,
        },
    )


def test_twenty_steps_of_uneven_masked_microbatches_equal_those_of_ddp(pool: ProcessPool, tmp_path: Path) -> None:
    ddp = pool.run(observe, 2, gpt(tmp_path / "ddp", "ddp"))[0]
    fsdp = pool.run(observe, 2, gpt(tmp_path / "fsdp"))[0]
    assert largest_difference(ddp, fsdp) < 1e-10
    assert fsdp["losses"] == pytest.approx(ddp["losses"], rel=1e-10)
    assert fsdp["norms"] == pytest.approx(ddp["norms"], rel=1e-10)


def divide_wrongly(config: dict[str, Any]) -> dict[str, Any]:
    """Train with gradients that are averaged over the ranks instead of summed."""
    from runtime.strategies import accelerated

    starting_gradient = accelerated.starting_gradient
    accelerated.starting_gradient = lambda loss, weight, scale: starting_gradient(loss, weight)  # type: ignore[assignment]
    try:
        return observe(config)
    finally:
        accelerated.starting_gradient = starting_gradient


def test_a_wrong_division_would_be_seen(pool: ProcessPool, tmp_path: Path) -> None:
    changes = {"optimizer": {"target": "SGD", "args": {"lr": 0.1}}, "limit": {"steps": 2}}
    right = pool.run(observe, 2, gpt(tmp_path / "right", **changes))[0]
    wrong = pool.run(divide_wrongly, 2, gpt(tmp_path / "wrong", **changes))[0]
    assert wrong["norms"][1] == pytest.approx(right["norms"][1] / 2)
    assert largest_difference(right, wrong) > 1e-3


@pytest.mark.parametrize(
    ("world_size", "options"),
    [
        pytest.param(1, {"wrap": ["Block"]}, marks=pytest.mark.single),
        (2, {"wrap": ["Block"], "no_sync": True, "reshard_after_forward": False}),
        (2, {"min_parameters": 500, "cpu_offload": True}),
        (2, {}),
        (3, {"wrap": ["Block"]}),  # uneven: 12 rows over 3 ranks, 23 rows over 3
        (4, {"wrap": ["Block"], "replicas": 2}),
    ],
)
def test_no_option_changes_the_answer(
    pool: ProcessPool, tmp_path: Path, world_size: int, options: dict[str, Any]
) -> None:
    changes = {
        "limit": {"steps": 4},
        "averaging": {"decay": 0.5},
        "data": {"train": {"target": "tiny_sharded:sentences"}, "validation": {"target": "tiny_sharded:sentences"}},
        "evaluation": {"every": "2 steps", "micro_size": 13},  # 5 microbatches: no world size divides them evenly
    }
    ddp = pool.run(observe, 1, gpt(tmp_path / "ddp", "ddp", **changes))[0]
    config = gpt(tmp_path / "fsdp", **changes, strategy={"kind": "fsdp", "fsdp": options})
    fsdp = pool.run(observe, world_size, config)[0]
    assert largest_difference(ddp, fsdp) < 1e-10
    assert fsdp["results"] == pytest.approx(ddp["results"], rel=1e-10)
    ours, theirs = averages(tmp_path / "fsdp", 4), averages(tmp_path / "ddp", 4)
    assert all(torch.allclose(ours[name], value, rtol=1e-10, atol=1e-12) for name, value in theirs.items())


def averages(folder: Path, step: int) -> dict[str, torch.Tensor]:
    average: dict[str, torch.Tensor] = load_state(checkpoint(folder, step))[1]["averaging"]["average"]
    return average


def checkpoint(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step-{step:08d}"


def full(folder: Path, **changes: Any) -> dict[str, Any]:
    """Dropout, a warm-up, an average, and steps enough to be in the middle of the second epoch."""
    return gpt(
        folder,
        **{
            "schedule": {"target": "CosineAnnealingLR", "args": {"T_max": 14}, "warmup_steps": 3},
            "averaging": {"decay": 0.9},
            "limit": {"steps": 14},
            **changes,
        },
    )


def test_a_run_stopped_within_an_epoch_goes_on_bit_for_bit(pool: ProcessPool, tmp_path: Path) -> None:
    whole = pool.run(observe, 2, full(tmp_path / "whole"))[0]
    config = full(tmp_path / "resumed")
    assert pool.run(observe_stopping, 2, config, 4)[0]["outcome"] == "stopped"
    resumed = pool.run(observe, 2, config)[0]
    assert_bitwise_equal(whole, resumed)
    assert resumed["losses"] == whole["losses"]
    ours, theirs = averages(tmp_path / "resumed", 14), averages(tmp_path / "whole", 14)
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_a_run_goes_on_with_other_numbers_of_processes_and_as_ddp_and_back(pool: ProcessPool, tmp_path: Path) -> None:
    whole = pool.run(observe, 1, full(tmp_path / "whole", strategy={"kind": "ddp"}))[0]
    ddp, fsdp = {"kind": "ddp"}, {"kind": "fsdp", "fsdp": {"wrap": ["Block"]}}
    replicated = {"kind": "fsdp", "fsdp": {"wrap": ["Block"], "replicas": 2}}
    turns = ((2, fsdp, 2), (1, fsdp, 4), (2, ddp, 6), (2, fsdp, 8), (4, replicated, 10), (1, ddp, 12), (2, fsdp, None))
    for world_size, strategy, after in turns:
        config = full(tmp_path / "turns", strategy=strategy)
        turned = pool.run(observe_stopping, world_size, config, after)[0]
    assert turned["step"] == 14
    assert largest_difference(whole, turned) < 1e-10
    assert turned["losses"] == pytest.approx(whole["losses"], rel=1e-10)
    ours, theirs = averages(tmp_path / "turns", 14), averages(tmp_path / "whole", 14)
    assert all(torch.allclose(ours[name], value, rtol=1e-10, atol=1e-12) for name, value in theirs.items())
