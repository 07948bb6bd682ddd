"""Where the device skips a non-finite update by itself and the host learns a step later, nothing else is different."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.strategies.ddp import DDPStrategy
from runtime.training.observers import StepReport
from tests.observed import assert_bitwise_equal, observe
from tests.process_pool import ProcessPool
from tests.test_divergence import failure, run, state, tensors

single = pytest.mark.single
RARELY = {"reporting": {"every": "1000 steps", "progress": False}, "checkpoint": {"every": "1000 steps", "keep": 10}}
SCHEDULE = {"target": "CosineAnnealingLR", "args": {"T_max": 6}, "warmup_steps": 2}


def late(call: Any, *args: Any) -> tuple[Any, int]:
    """Let torch's fused optimizers skip on the CPU as on a GPU; return how often the host learned late, too."""
    learned_late: list[int] = []

    def note(report: StepReport) -> None:
        if report.applied is None:
            learned_late.append(report.step)

    devices = DDPStrategy.skipping_devices
    DDPStrategy.skipping_devices = ("cpu",)
    try:
        return call(*args, observers=[note]), len(learned_late)
    finally:
        DDPStrategy.skipping_devices = devices


@single
@pytest.mark.parametrize("batch", [0, 2, 5])
@pytest.mark.parametrize(
    "optimizer",
    [
        {"target": "SGD", "args": {"lr": 0.1, "momentum": 0.9}},
        {"target": "SGD", "args": {"lr": 0.1, "momentum": 0.9, "nesterov": True}, "max_grad_norm": 0.5},
        {"target": "AdamW", "args": {"lr": 0.01}},
        {"target": "Adam", "args": {"lr": 0.01, "amsgrad": True}, "max_grad_norm": 1.0},
        {"target": "Adagrad", "args": {"lr": 0.01}},
    ],
    ids=["SGD", "SGD clipped", "AdamW", "Adam clipped", "Adagrad"],
)
def test_the_state_is_bit_for_bit_what_the_host_would_have_left(
    tmp_path: Path, optimizer: dict[str, Any], batch: int
) -> None:
    objective = {"target": "tiny_divergence:Astray", "args": {"batch": batch}}
    changes = {"optimizer": optimizer, "objective": objective, "schedule": SCHEDULE, **RARELY}
    by_host = observe(run(tmp_path / "host", divergence={"non_finite": "skip"}, **changes))
    by_device, times = late(observe, run(tmp_path / "device", divergence={"non_finite": "skip"}, **changes))
    kind: Any = getattr(torch.optim, optimizer["target"])
    if getattr(
        kind([torch.zeros(1)], fused=True), "_step_supports_amp_scaling", False
    ):  # torch 2.11's Adagrad does not
        assert times >= 3
    assert_bitwise_equal(by_host, by_device)
    states = [state(tmp_path / name, "step-00000006") for name in ("host", "device")]
    assert tensors(states[0]) == tensors(states[1])
    assert states[0][1]["progress"] == states[1][1]["progress"]
    assert states[0][1]["progress"]["skipped_steps"] == [batch + 1]


@single
def test_losses_and_norms_are_reported_as_if_the_host_had_judged(tmp_path: Path) -> None:
    changes = {**RARELY, "reporting": {"every": "2 steps", "progress": False}, "divergence": {"non_finite": "skip"}}
    by_host = observe(run(tmp_path / "host", **changes))
    by_device, times = late(observe, run(tmp_path / "device", **changes))
    assert times >= 2
    assert by_host["losses"] == by_device["losses"]
    assert by_host["norms"] == pytest.approx(by_device["norms"])


@single
def test_a_stop_comes_a_step_later_and_leaves_the_same_checkpoint(tmp_path: Path) -> None:
    message, times = late(failure, run(tmp_path, checkpoint={"every": "2 steps", "keep": 10}))
    assert times == 0 and "step 3 (epoch 1, batch 3): the gradient is NaN or infinite" in message  # reports every step
    message, times = late(failure, run(tmp_path / "rarely", **RARELY))
    assert times >= 1 and "step 3 (epoch 1, batch 3): the gradient is NaN or infinite" in message
    assert not list((tmp_path / "rarely").glob("checkpoints/step-*"))


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=single), 2])
def test_a_rollback_is_the_same(pool: ProcessPool, tmp_path: Path, world_size: int) -> None:
    changes = {**RARELY, "checkpoint": {"every": "2 steps", "keep": 10}, "divergence": {"non_finite": "rollback"}}
    changes["objective"] = {"target": "tiny_divergence:Astray", "args": {"batch": 2}}
    by_host = pool.run(observe, world_size, run(tmp_path / "host", **changes))
    by_device = pool.run(late, world_size, observe, run(tmp_path / "device", **changes))
    for expected, (got, times) in zip(by_host, by_device, strict=True):
        assert times >= 1
        assert_bitwise_equal(expected, got)
    assert by_host[0]["losses"] == by_device[0][0]["losses"]


@pytest.mark.parametrize("world_size", [2, 3])
def test_all_ranks_skip_alike_with_batch_norm(pool: ProcessPool, tmp_path: Path, world_size: int) -> None:
    changes = {**RARELY, "model": {"target": "tiny:Mlp", "args": {}}, "data": {"train": {"target": "tiny:points"}}}
    changes["objective"] = {"target": "tiny_divergence:Astray", "args": {"dtype": "float64"}}
    changes["divergence"] = {"non_finite": "skip"}
    by_host = pool.run(observe, world_size, run(tmp_path / "host", **changes))
    by_device = pool.run(late, world_size, observe, run(tmp_path / "device", **changes))
    for expected, (got, times) in zip(by_host, by_device, strict=True):
        assert times >= 3
        assert_bitwise_equal(expected, got)
