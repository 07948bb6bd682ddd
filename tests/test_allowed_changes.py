"""What resume.allow_changes allows is changed, or refused by name; never accepted and left as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.config.learning import AveragingSection
from runtime.errors import CheckpointError
from runtime.optimization.averaging import WeightAverage
from tests.observed import assert_bitwise_equal, configuration, largest_difference, observe
from tests.process_pool import ProcessPool, RemoteError
from tests.test_resumption import observe_rates, observe_stopping

AFTER = 3


def plain(folder: Path, **changes: Any) -> dict[str, Any]:
    return configuration(
        folder,
        **{
            "model": {"target": "tiny:Mlp", "args": {"batch_norm": False, "dropout": 0.0}},
            "batch": {"global_size": 16, "slots": 2},
            "limit": {"steps": 6},
            **changes,
        },
    )


def resumed(pool: ProcessPool, folder: Path, before: Any, after: Any, *, key: str, ranks: int = 1) -> dict[str, Any]:
    """Train three steps under one configuration and the rest under another."""
    pool.run(observe_stopping, ranks, plain(folder, **before), AFTER)
    return pool.run(observe, ranks, plain(folder, **after, resume={"allow_changes": [key]}))[0]


def observe_setting(config: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Train without an interruption, and set hyper-parameters by hand after the third update."""
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    updates: list[None] = []

    def setting(optimizer: Any, *_: Any) -> None:
        updates.append(None)
        if len(updates) > AFTER:
            for group in optimizer.param_groups:
                group.update(values)

    hook = register_optimizer_step_pre_hook(setting)
    try:
        return observe(config)
    finally:
        hook.remove()


CHANGES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "weight_decay": ("AdamW", {}, {"weight_decay": 0.5}),
    "betas": ("AdamW", {}, {"betas": [0.5, 0.6]}),
    "eps": ("Adam", {}, {"eps": 0.1}),
    "maximize": ("AdamW", {}, {"maximize": True}),
    "momentum": ("SGD", {"momentum": 0.9}, {"momentum": 0.2}),
    "nesterov": ("SGD", {"momentum": 0.9}, {"nesterov": True}),
    "alpha": ("RMSprop", {}, {"alpha": 0.5}),
    "lr_decay": ("Adagrad", {}, {"lr_decay": 0.5}),
    "begun momentum": ("SGD", {"momentum": 0}, {"momentum": 0.9}),
}


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.single), 2])
@pytest.mark.parametrize("change", CHANGES)
def test_every_hyper_parameter_that_may_change_does(pool: ProcessPool, tmp_path: Path, change: str, ranks: int) -> None:
    if ranks == 2 and change not in ("weight_decay", "momentum"):
        pytest.skip("one of each optimizer is enough")
    target, args, new = CHANGES[change]
    before = {"optimizer": {"target": target, "args": {"lr": 0.05, **args}}}
    after = {"optimizer": {"target": target, "args": {"lr": 0.05, **args, **new}}}
    key = f"optimizer.args.{next(iter(new))}"
    got = resumed(pool, tmp_path / "resumed", before, after, key=key, ranks=ranks)
    expected = pool.run(observe_setting, ranks, plain(tmp_path / "set", **before), new)[0]
    unchanged = pool.run(observe, ranks, plain(tmp_path / "unchanged", **before))[0]
    assert_bitwise_equal(expected, got)
    assert largest_difference(unchanged, got) > 1e-6


@pytest.mark.parametrize("kind", ["fsdp", "zero"])
def test_a_sharded_optimizer_changes_as_well(pool: ProcessPool, tmp_path: Path, kind: str) -> None:
    if kind == "zero":
        pytest.importorskip("deepspeed")
    small = {
        "model": {"target": "tiny:Mlp", "args": {"batch_norm": False, "dropout": 0.0, "dtype": "float32"}},
        "data": {"train": {"target": "tiny:points", "args": {"dtype": "float32"}}},
        "strategy": {"kind": kind},
    }
    before = {**small, "optimizer": {"target": "AdamW", "args": {"lr": 0.05}}}
    after = {**small, "optimizer": {"target": "AdamW", "args": {"lr": 0.05, "weight_decay": 0.9}}}
    got = resumed(pool, tmp_path / "resumed", before, after, key="optimizer.args.weight_decay", ranks=2)
    whole = {**before, "strategy": {}}
    expected = pool.run(observe_setting, 1, plain(tmp_path / "set", **whole), {"weight_decay": 0.9})[0]
    assert largest_difference(expected, got) < 1e-4


@pytest.mark.single
def test_arguments_of_one_group_change_and_those_of_others_stay(pool: ProcessPool, tmp_path: Path) -> None:
    def grouped(decay: float) -> dict[str, Any]:
        groups = [{"match": ["*.bias"], "args": {"weight_decay": decay, "lr": 0.01}}]
        return {"optimizer": {"target": "AdamW", "args": {"lr": 0.05, "weight_decay": 0.2}, "groups": groups}}

    resumed(pool, tmp_path, grouped(0.0), grouped(0.7), key="optimizer.groups")
    groups = saved(tmp_path)["optimizer"]["param_groups"]
    assert sorted((group["lr"], group["weight_decay"]) for group in groups) == [(0.01, 0.7), (0.05, 0.2)]


@pytest.mark.single
def test_from_adam_to_adamw_the_decay_is_decoupled(pool: ProcessPool, tmp_path: Path) -> None:
    before, after = ({"optimizer": {"target": t, "args": {"lr": 0.05, "weight_decay": 0.5}}} for t in ("Adam", "AdamW"))
    got = resumed(pool, tmp_path / "resumed", before, after, key="optimizer.target")
    expected = pool.run(observe_setting, 1, plain(tmp_path / "set", **before), {"decoupled_weight_decay": True})[0]
    assert_bitwise_equal(expected, got)


@pytest.mark.single
@pytest.mark.parametrize(
    ("section", "key", "before", "after", "words"),
    [
        ("optimizer", "optimizer", {"target": "AdamW", "args": {"lr": 0.05}},
         {"target": "AdamW", "args": {"lr": 0.05, "amsgrad": True}}, "optimizer.args.amsgrad cannot .*max_exp_avg_sq"),
        ("optimizer", "optimizer", {"target": "RMSprop", "args": {"lr": 0.05}},
         {"target": "RMSprop", "args": {"lr": 0.05, "centered": True}}, "optimizer.args.centered cannot .*grad_avg"),
        ("optimizer", "optimizer", {"target": "AdamW", "args": {"lr": 0.05}},
         {"target": "AdamW", "args": {"lr": 0.05}, "no_decay": True}, "optimizer.no_decay"),
        # As many parameters in each group as before, and of the same shapes: their state would go to each other.
        ("optimizer", "optimizer",
         {"target": "AdamW", "args": {"lr": 0.05}, "groups": [{"match": ["*.bias"], "args": {"lr": 1}}]},
         {"target": "AdamW", "args": {"lr": 0.05}, "groups": [{"match": ["*.weight"], "args": {"lr": 1}}]}, "optimizer.groups"),
        ("model", "model", {"target": "tiny:Mlp", "args": {"batch_norm": False}},
         {"target": "tiny:Mlp", "args": {"batch_norm": False}, "freeze": ["net.0.*"]}, "model.freeze"),
        ("averaging", "averaging", {"kind": "ema"}, {"kind": "swa", "start": "4 steps"}, "averaging.kind"),
        ("objective", "objective", {"target": "tiny_changes:Tempered", "args": {"temperature": 1.0}},
         {"target": "tiny_changes:Tempered", "args": {"temperature": 2.0}}, "objective: .*temperature .*trained"),
    ],
)  # fmt: skip
def test_a_change_that_cannot_be_made_is_refused_by_name(
    pool: ProcessPool, tmp_path: Path, section: str, key: str, before: Any, after: Any, words: str
) -> None:
    pool.run(observe_stopping, 1, plain(tmp_path, **{section: before}), AFTER)
    config = plain(tmp_path, **{section: after}, resume={"allow_changes": [key]})
    with pytest.raises(CheckpointError, match=words):
        observe(config)


@pytest.mark.parametrize(("size", "steps"), [(24, 5), (8, 9), (48, 4), (32, None), (7, None)])
@pytest.mark.parametrize("sampler", [None, {"target": "RandomSampler"}], ids=["shuffled", "sampler"])
@pytest.mark.single
def test_another_global_batch_goes_on_behind_the_samples_of_the_epoch_that_were_trained(
    pool: ProcessPool, tmp_path: Path, size: int, steps: int | None, sampler: dict[str, Any] | None
) -> None:
    """An epoch has 96 samples, 48 of which come in three batches of 16."""
    data = {"train": {"target": "tiny:points", "args": {}}, "sampler": sampler}
    before = {"data": data, "limit": {"epochs": 1}, "batch": {"global_size": 16, "slots": 2}}
    after = {**before, "batch": {"global_size": size, "slots": 2}}
    if steps is None:
        with pytest.raises(RemoteError, match=r"in the middle of epoch 1, after 3 batches of 16.*to a divisor of 48"):
            resumed(pool, tmp_path, before, after, key="batch.global_size")
        return
    got = resumed(pool, tmp_path, before, after, key="batch.global_size")
    assert (got["step"], saved(tmp_path, steps)["progress"]["samples"]) == (steps, 96)


@pytest.mark.single
def test_batches_of_a_samplers_own_have_no_other_size_within_an_epoch(pool: ProcessPool, tmp_path: Path) -> None:
    data = {"train": {"target": "tiny:points", "args": {}}, "balance": {"classes": 1}}
    before = {"data": data, "batch": {"global_size": 16, "slots": 2}}
    after = {**before, "batch": {"global_size": 8, "slots": 2}}
    with pytest.raises(RemoteError, match=r"Change it at the end of an epoch\n$"):
        resumed(pool, tmp_path, before, after, key="batch.global_size")


SCHEDULES: dict[str, dict[str, Any]] = {
    "warm-up alone": {"warmup_steps": 5},
    "LambdaLR": {"target": "LambdaLR", "args": {"lr_lambda": {"target": "tiny_changes:halving"}}},
    "StepLR": {"target": "StepLR", "args": {"step_size": 2, "gamma": 0.5}, "warmup_steps": 2},
    "ExponentialLR": {"target": "ExponentialLR", "args": {"gamma": 0.8}},
    "CosineAnnealingLR": {"target": "CosineAnnealingLR", "args": {"T_max": 8}},
    "LinearLR": {"target": "LinearLR", "args": {"total_iters": 5}},
    "CosineAnnealingWarmRestarts": {"target": "CosineAnnealingWarmRestarts", "args": {"T_0": 2}},
    "SequentialLR": {
        "target": "SequentialLR",
        "args": {
            "schedulers": [
                {"target": "LinearLR", "args": {"total_iters": 4}},
                {"target": "ExponentialLR", "args": {"gamma": 0.5}},
            ],
            "milestones": [4],
        },
    },
    "WarmupStableDecay": {"target": "WarmupStableDecay", "args": {"total_iters": 6, "decay": 0.5}},
}


@pytest.mark.single
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_another_rate_is_the_base_of_all_rates_that_follow(pool: ProcessPool, tmp_path: Path, schedule: str) -> None:
    def at(folder: str, rate: float) -> dict[str, Any]:
        optimizer = {"target": "SGD", "args": {"lr": rate}}
        return plain(tmp_path / folder, optimizer=optimizer, schedule=SCHEDULES[schedule])

    pool.run(observe_rates, 1, at("resumed", 0.1), AFTER)
    config = {**at("resumed", 0.04), "resume": {"allow_changes": ["optimizer.args.lr"]}}
    got = pool.run(observe_rates, 1, config, None)[0]
    expected = pool.run(observe_rates, 1, at("whole", 0.04), None)[0]
    assert [rates[0] for rates in got] == pytest.approx([rates[0] for rates in expected[AFTER:]], rel=1e-12)


@pytest.mark.single
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, {"target": "CosineAnnealingLR", "args": {"T_max": 8}}),
        (None, {"target": "OneCycleLR", "args": {"max_lr": 0.3, "total_steps": 8}}),
        (SCHEDULES["StepLR"], SCHEDULES["CosineAnnealingLR"]),
        (SCHEDULES["CosineAnnealingLR"], None),
        ({"target": "OneCycleLR", "args": {"max_lr": 0.3, "total_steps": 8}},
         {"target": "OneCycleLR", "args": {"max_lr": 0.6, "total_steps": 8, "max_momentum": 0.8}}),
        ({"target": "CyclicLR", "args": {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 3}},
         {"target": "CyclicLR", "args": {"base_lr": 0.02, "max_lr": 0.2, "step_size_up": 3, "base_momentum": 0.5}}),
        ({"target": "ExponentialLR", "args": {"gamma": 0.5}, "interval": "epoch"},
         {"target": "ExponentialLR", "args": {"gamma": 0.5}}),
    ],
)  # fmt: skip
def test_another_schedule_gives_the_rates_that_it_would_have_given(
    pool: ProcessPool, tmp_path: Path, before: Any, after: Any
) -> None:
    optimizer = {"target": "SGD", "args": {"lr": 0.1, "momentum": 0.9}}

    def under(folder: str, schedule: Any) -> dict[str, Any]:
        return plain(tmp_path / folder, optimizer=optimizer, **({"schedule": schedule} if schedule else {}))

    pool.run(observe_rates, 1, under("resumed", before), AFTER)
    config = {**under("resumed", after), "resume": {"allow_changes": ["schedule"]}}
    got = pool.run(observe_rates, 1, config, None)[0]
    expected = pool.run(observe_rates, 1, under("whole", after), None)[0]
    assert [rates[0] for rates in got] == pytest.approx([rates[0] for rates in expected[AFTER:]], rel=1e-9)
    momenta = [saved(tmp_path / folder)["optimizer"]["param_groups"][0]["momentum"] for folder in ("resumed", "whole")]
    assert momenta[0] == pytest.approx(momenta[1])


@pytest.mark.single
@pytest.mark.parametrize(
    ("section", "before", "after", "name"),
    [
        ("objective", {"target": "tiny_changes:Tempered", "args": {"first_class": 1.0}},
         {"target": "tiny_changes:Tempered", "args": {"first_class": 4.0}}, "objective.classes"),
        ("model", {"target": "tiny_changes:Scaled", "args": {"scale": 1.0}},
         {"target": "tiny_changes:Scaled", "args": {"scale": 4.0}}, "model.scale"),
    ],
)  # fmt: skip
def test_arguments_that_became_buffers_change_and_what_was_learnt_stays(
    pool: ProcessPool, tmp_path: Path, section: str, before: Any, after: Any, name: str
) -> None:
    sections = {"model": {"target": "tiny_changes:Scaled", "args": {}}}
    resumed(pool, tmp_path, {**sections, section: before}, {**sections, section: after}, key=section)
    assert name in saved(tmp_path)["built"]["digests"]
    from runtime.checkpoints.load import load_state

    model, training = load_state(next((tmp_path / "checkpoints").glob("step-00000006*")))
    assert model["scale"].unique().item() == (4.0 if section == "model" else 1.0)
    assert model["mean"].abs().min() > 0  # of all six steps, and not begun anew
    if section == "objective":
        assert training["objective"]["classes"].tolist() == [4.0, 1.0, 1.0]
        assert training["objective"]["temperature"].item() != 1.0  # trained


@pytest.mark.single
def test_an_average_taken_in_more_often_than_it_has_waited_goes_on() -> None:
    module = torch.nn.Linear(1, 1)
    seldom = WeightAverage(module, AveragingSection.model_validate({"kind": "ema", "every": "10 steps"}))
    for _ in range(5):
        seldom.update()
    often = WeightAverage(module, AveragingSection.model_validate({"kind": "ema", "every": "3 steps"}))
    often.load_state_dict(seldom.state_dict())
    often.update()
    assert often.count == 1
    by_epoch = WeightAverage(module, AveragingSection.model_validate({"kind": "ema", "every": "3 epochs"}))
    by_epoch.load_state_dict(seldom.state_dict())
    by_epoch.after_epoch()
    assert by_epoch.count == 0  # five steps are no epochs


@pytest.mark.single
def test_a_later_start_of_an_average_forgets_what_came_before_it() -> None:
    module = torch.nn.Linear(1, 1)
    early = WeightAverage(module, AveragingSection(kind="ema"))
    early.update()
    late = WeightAverage(module, AveragingSection.model_validate({"kind": "ema", "start": "4 steps"}))
    late.load_state_dict(early.state_dict())
    assert late.count == 0


def saved(folder: Path, step: int = 6) -> dict[str, Any]:
    from runtime.checkpoints.load import load_state

    return load_state(next((folder / "checkpoints").glob(f"step-{step:08}*")))[1]
