"""A step that must not be applied: the run stops, leaves it out bit for bit, or goes back and round it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.checkpoints.load import load_state
from runtime.checkpoints.serialization import split_state
from runtime.data.batches import Cursor, Window
from runtime.errors import DivergenceError
from runtime.training.progress import Progress
from tests.chaos.nursery import Nursery
from tests.forked import Forked
from tests.observed import assert_bitwise_equal, configuration, largest_difference, observe
from tests.process_pool import ProcessPool

single = pytest.mark.single
ONE_EPOCH = 6


def run(folder: Path, **changes: Any) -> dict[str, Any]:
    return configuration(
        folder,
        **{
            "model": {"target": "tiny:Deep", "args": {}},
            "data": {"train": {"target": "tiny:points", "args": {"dtype": "float32"}}},
            "objective": "tiny_divergence:Astray",
            "optimizer": {"target": "AdamW", "args": {"lr": 0.01}},
            "averaging": {"decay": 0.9},
            "limit": {"epochs": 1},
            "checkpoint": {"every": "1 step", "keep": 10},
            **changes,
        },
    )


def state(folder: Path, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    return load_state(folder / "checkpoints" / name)


def tensors(state: tuple[dict[str, Any], dict[str, Any]]) -> dict[str, bytes]:
    model, training = state
    kept = {key: training[key] for key in ("objective", "optimizer", "weights", "averaging", "schedule", "strategy")}
    tree, found = split_state({"model": model, **kept})
    return {"tree": repr(tree).encode(), **{name: value.numpy().tobytes() for name, value in found.items()}}


def failure(config: dict[str, Any], **options: Any) -> str:
    try:
        observe(config, **options)
    except DivergenceError as error:
        return str(error)
    return "trained"


@single
@pytest.mark.parametrize(
    "optimizer",
    [
        {"target": "SGD", "args": {"lr": 0.1, "momentum": 0.9}},
        {"target": "AdamW", "args": {"lr": 0.01, "fused": True}},
        {"target": "AdamW", "args": {"lr": 0.01, "fused": False}, "max_grad_norm": 1.0},
        {"target": "schedulefree:AdamWScheduleFree", "args": {"lr": 0.01}},
    ],
    ids=["SGD", "AdamW fused", "AdamW", "schedule-free"],
)
def test_a_skipped_update_leaves_everything_as_it_was_bit_for_bit(tmp_path: Path, optimizer: dict[str, Any]) -> None:
    if "schedulefree" in optimizer["target"]:
        pytest.importorskip("schedulefree", reason="needs the extra dev")
    schedule = {"target": "CosineAnnealingLR", "args": {"T_max": 6}, "warmup_steps": 2}
    changes: dict[str, Any] = {"optimizer": optimizer, "schedule": schedule, "divergence": {"non_finite": "skip"}}
    if optimizer["target"].startswith("schedulefree"):  # it averages by itself
        changes["averaging"] = None
    observe(run(tmp_path, **changes))
    before, after = state(tmp_path, "step-00000002"), state(tmp_path, "step-00000003")
    assert tensors(before) == tensors(after)
    assert tensors(after) != tensors(state(tmp_path, "step-00000004"))
    assert after[1]["progress"]["updates"] == 2
    assert after[1]["progress"]["skipped_steps"] == [3]
    messages = [json.loads(line).get("text", "") for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert any(
        "step 3 (epoch 1, batch 3): the gradient is NaN or infinite; the update is skipped" in m for m in messages
    )


@pytest.mark.parametrize("world_size", [2, 3])
def test_all_ranks_skip_alike(pool: ProcessPool, tmp_path: Path, world_size: int) -> None:
    one = observe(run(tmp_path / "one", divergence={"non_finite": "skip"}))
    several = pool.run(observe, world_size, run(tmp_path / "several", divergence={"non_finite": "skip"}))
    for reply in several:
        assert_bitwise_equal(reply, several[0])
    assert largest_difference(one, several[0]) < 1e-5  # float32; measured: 1.1e-6


@single
def test_updates_that_are_skipped_without_end_stop_the_run(tmp_path: Path) -> None:
    changes = {"objective": "tiny_divergence:AlwaysAstray", "divergence": {"non_finite": "skip", "max_skips": 4}}
    assert "step 5 (epoch 1, batch 5)" in failure(run(tmp_path, **changes))


@single
def test_a_rollback_goes_round_the_batch_and_is_recorded(tmp_path: Path) -> None:
    rolled = observe(run(tmp_path / "rolled", divergence={"non_finite": "rollback"}))
    batches = {"target": "tiny_divergence:GoodBatches", "args": {"without": [2]}}
    data = {"train": {"target": "tiny:points", "args": {"dtype": "float32"}}, "batch_sampler": batches}
    around = observe(run(tmp_path / "around", data=data))
    assert rolled["step"] == around["step"] == ONE_EPOCH - 1
    assert_bitwise_equal(rolled, around)
    assert rolled["losses"] == around["losses"]  # each step once, though the third was tried twice
    record = json.loads((tmp_path / "rolled" / "checkpoints" / "rollbacks.json").read_text())["rollbacks"]
    assert [(r["attempt"], r["target_step"], r["failed_step"], r["skipped"]) for r in record] == [(1, 2, 3, [[0, 2]])]
    assert state(tmp_path / "rolled", "step-00000005-attempt-1")[1]["progress"]["attempt"] == 1


@pytest.mark.parametrize("world_size", [2, 3])
def test_all_ranks_roll_back_alike(pool: ProcessPool, tmp_path: Path, world_size: int) -> None:
    changes = {
        "model": {"target": "tiny:Mlp", "args": {}},
        "data": {"train": {"target": "tiny:points", "args": {}}},
        "objective": {"target": "tiny_divergence:Astray", "args": {"dtype": "float64"}},
        "divergence": {"non_finite": "rollback"},
        "batch": {"global_size": 16, "slots": 6},
    }
    one = observe(run(tmp_path / "one", **changes))
    several = pool.run(observe, world_size, run(tmp_path / "several", **changes))
    assert several[0]["step"] == ONE_EPOCH - 1
    assert largest_difference(one, several[0]) < 1e-10
    for reply in several:
        assert_bitwise_equal(reply, several[0])


@single
def test_an_epoch_whose_first_batch_is_left_out_begins_with_its_first_step() -> None:
    progress = Progress(skipped_batches=[Cursor(1, 0)])
    for cursor, following, epoch in ((Cursor(0, 5), Cursor(1, 1), 1), (Cursor(1, 1), Cursor(1, 2), 2)):
        progress.advance(Window(cursor, following, (), 0, 0, following.batch == 1, False, 1.0))
        assert progress.epoch == epoch


@single
def test_the_first_step_can_be_rolled_back_too(tmp_path: Path) -> None:
    objective = {"target": "tiny_divergence:Astray", "args": {"batch": 0}}
    rolled = observe(run(tmp_path, objective=objective, divergence={"non_finite": "rollback"}))
    assert (rolled["outcome"], rolled["step"]) == ("finished", ONE_EPOCH - 1)


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=single), 2])
def test_the_last_step_can_be_rolled_back_too(pool: ProcessPool, tmp_path: Path, world_size: int) -> None:
    objective = {"target": "tiny_divergence:Astray", "args": {"batch": 5}}
    data = {
        "train": {"target": "tiny:points", "args": {"dtype": "float32"}},
        "validation": {"target": "tiny:points", "args": {"split": "validation", "dtype": "float32"}},
    }
    changes = {"objective": objective, "data": data, "divergence": {"non_finite": "rollback"}}
    rolled = pool.run(observe, world_size, run(tmp_path, **changes))[0]
    assert (rolled["outcome"], rolled["step"]) == ("finished", ONE_EPOCH - 1)
    assert rolled["results"]["samples"] == 96
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {record["epoch"] for record in records if record["event"] == "evaluation"} == {1}
    again = pool.run(observe, world_size, run(tmp_path, **changes))[0]
    assert again["results"]["samples"] == 96


@single
@pytest.mark.parametrize("killed_at", ["before the record", "after the record", "in the replay"])
def test_a_kill_during_a_rollback_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: str
) -> None:
    from runtime.checkpoints.rollback_history import RollbackHistory
    from runtime.checkpoints.run_state import RunState

    changes = {"divergence": {"non_finite": "rollback", "learning_rate_factor": 0.5}}
    whole = observe(run(tmp_path / "whole", **changes))
    config = run(tmp_path / "killed", **changes)
    with monkeypatch.context() as patched:
        if killed_at != "in the replay":
            owner, name = (RollbackHistory, "record") if killed_at == "before the record" else (RunState, "restore")
            patched.setattr(owner, name, kill)
        with pytest.raises(Killed):
            observe(config, observers=[lambda report: kill() if report.attempt == 1 else None])
    resumed = observe(config)
    assert_bitwise_equal(whole, resumed)
    rate = state(tmp_path / "killed", "step-00000005-attempt-1")[1]["optimizer"]["param_groups"][0]["lr"]
    assert rate == 0.005


class Killed(BaseException):
    pass


def kill(*args: Any) -> None:
    raise Killed


@single
def test_a_poisoned_checkpoint_is_never_gone_back_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The NaN is in the checkpoints of steps 3 and 4 and is noticed at step 5; then the replay is killed."""
    from runtime.checkpoints.run_state import RunState

    changes = {
        "model": {"target": "tiny_divergence:PoisonedBuffer", "args": {}},
        "objective": "CrossEntropyLoss",
        "batch": {"global_size": 16, "slots": 1},
        "divergence": {"non_finite": "rollback"},
    }
    config = run(tmp_path, **changes)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(RunState, "restore", kill)
        observe(config)
    record = json.loads((tmp_path / "checkpoints" / "rollbacks.json").read_text())["rollbacks"]
    assert [(r["target_step"], r["failed_step"]) for r in record] == [(2, 5)]
    assert any("nan" in repr(state(tmp_path, name)[0]["poison"]) for name in ("step-00000003", "step-00000004"))
    steps: list[int] = []
    again = {**config, "divergence": {"non_finite": "stop"}}
    assert "2 times" not in failure(again, observers=[lambda report: steps.append(report.step)])
    assert steps[0] == 3


def test_a_poisoned_checkpoint_is_never_resumed_after_a_kill_in_the_replay(nursery: Nursery, tmp_path: Path) -> None:
    changes = {
        "model": {"target": "tiny_divergence:KilledInReplay", "args": {"told": str(tmp_path / "told")}},
        "objective": "CrossEntropyLoss",
        "batch": {"global_size": 16, "slots": 2},
        "divergence": {"non_finite": "rollback"},
    }
    config = run(tmp_path / "run", **changes)
    for start in range(2):
        with Forked(nursery, tmp_path, config, 2) as launch:
            launch.wait_for_end()
        if start == 0:
            assert (tmp_path / "told").is_file(), launch.told()
            assert state(tmp_path / "run", "step-00000004")[0]["poison"].isnan()
    assert "back to step-00000002 as attempt 1" in launch.told()
    assert re.findall(r"resumed .*step (\d+)", launch.told()) == ["2"]


@single
def test_rollbacks_that_do_not_help_go_further_back_and_end(tmp_path: Path) -> None:
    changes = {
        "objective": "tiny_divergence:AlwaysAstray",
        "divergence": {"non_finite": "rollback", "max_rollbacks": 2},
    }
    assert "rolled back 2 times" in failure(run(tmp_path, **changes))


@single
def test_two_neighbouring_batches_are_gone_round(tmp_path: Path) -> None:
    changes = {"objective": "tiny_divergence:AstrayTwice", "divergence": {"non_finite": "rollback"}}
    rolled = observe(run(tmp_path, **changes))
    assert (rolled["outcome"], rolled["step"]) == ("finished", ONE_EPOCH - 2)
    record = json.loads((tmp_path / "checkpoints" / "rollbacks.json").read_text())["rollbacks"]
    assert [r["skipped"] for r in record] == [[[0, 2]], [[0, 3]]]
    assert [r["target_step"] for r in record] == [2, 1]  # the second time from further back


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=single), 2])
def test_a_loss_that_jumps_is_skipped_before_its_update(pool: ProcessPool, tmp_path: Path, world_size: int) -> None:
    changes = {
        "objective": {"target": "tiny_divergence:Astray", "args": {"batch": 4, "factor": 1000.0}},
        "divergence": {"spike": {"sigma": 10.0, "window": 3, "policy": "skip"}},
    }
    pool.run(observe, world_size, run(tmp_path, **changes))
    assert tensors(state(tmp_path, "step-00000004")) == tensors(state(tmp_path, "step-00000005"))
    assert state(tmp_path, "step-00000006")[1]["progress"]["skipped_steps"] == [5]


@single
def test_the_losses_that_spikes_are_judged_by_survive_a_resumption(tmp_path: Path) -> None:
    changes = {
        "objective": {"target": "tiny_divergence:Astray", "args": {"batch": 4, "factor": 1000.0}},
        "divergence": {"spike": {"sigma": 10.0, "window": 4}},
    }
    observe(run(tmp_path, **{**changes, "limit": {"steps": 4}}))
    message = failure(run(tmp_path, **{**changes, "limit": {"steps": 6}}))
    assert "step 5 (epoch 1, batch 5): the loss jumped to" in message
    assert "of 4 steps" in message


@single
def test_skipping_leaves_the_search_for_a_loss_scale_alone(tmp_path: Path) -> None:
    """In fp16 an overflow lowers the scale; it is not counted as a skip of the policy's."""
    config = run(tmp_path, precision="fp16", divergence={"non_finite": "stop"})
    assert observe(config)["outcome"] == "finished"
    before, after = state(tmp_path, "step-00000002"), state(tmp_path, "step-00000003")
    assert torch.equal(before[0]["last.weight"], after[0]["last.weight"])
    assert after[1]["strategy"]["scaler"]["scale"] == before[1]["strategy"]["scaler"]["scale"] / 2
