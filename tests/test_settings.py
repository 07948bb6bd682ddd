"""Settings that are told or refused before the first step, and what a schedule or an optimizer raises at its first call."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.optim import SGD
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import TensorDataset

from runtime import cli
from runtime.build.builder import Builder
from runtime.checks.settings import check_settings
from runtime.config.file import load
from runtime.errors import ConfigurationError
from runtime.objective import TrainingModule
from runtime.optimization.rehearsal import StandIn
from runtime.session import train
from tests.test_additivity import points

HERE = "tests.test_settings"
STEPS = {"steps": 40}


class Wrapping(LRScheduler):
    """A schedule that keeps another one."""

    def __init__(self, optimizer: Any, after: LRScheduler) -> None:
        self.after = after
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        return [group["lr"] / 2 for group in self.optimizer.param_groups]

    def step(self, epoch: Any = None) -> None:
        if hasattr(self, "_last_lr"):
            self.after.step()
        super().step(epoch)


class Raising(LRScheduler):
    def get_lr(self) -> list[Any]:
        if self.last_epoch > 1:
            raise ZeroDivisionError("mine")
        return list(self.base_lrs)


class RaisingOptimizer(SGD):
    def step(self, closure: Any = None) -> Any:
        raise KeyError("mine")


class Scaled(TensorDataset):
    """A reader that prepares its samples."""

    shared_arguments = ("scale",)

    def __init__(self, scale: float = 1.0) -> None:
        inputs, target = points().tensors
        super().__init__(scale * inputs, target)


def half() -> torch.nn.Module:
    return torch.nn.Linear(6, 4).half()


def late(step: int) -> float:
    if step > 7:
        raise ValueError("late")
    return 1.0


def configuration(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "output": str(folder / "run"),
        "model": {"target": "torch.nn.Linear", "args": {"in_features": 6, "out_features": 4}},
        "data": {"train": "tests.test_additivity:points", "validation": "tests.test_additivity:points"},
        "batch": {"global_size": 16},
        "objective": "CrossEntropyLoss",
        "optimizer": {"target": "SGD", "args": {"lr": 0.1}},
        "limit": STEPS,
        "evaluation": {"every": "10 steps"},
        **changes,
    }


def section(target: str, **args: Any) -> dict[str, Any]:
    return {"target": target, "args": args}


def warned(folder: Path) -> list[str]:
    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [r["text"] for r in records if r["event"] == "message" and r["text"].startswith("warning: ")]


ACCURACY = section("MulticlassAccuracy", num_classes=4)
REFUSED: list[tuple[dict[str, Any], str, list[str]]] = [
    # raised at the first call, or in a constructor
    ({"schedule": section("CosineAnnealingLR", T_max=0)}, "schedule.args", ["CosineAnnealingLR raised ZeroDivisionError"]),
    ({"schedule": section("StepLR", step_size=0)}, "schedule.args", ["StepLR raised ZeroDivisionError"]),
    ({"schedule": section("SequentialLR", milestones=[1], schedulers=[section("ConstantLR"), section("StepLR", step_size=0)])},
     "schedule.args", ["ZeroDivisionError"]),
    ({"schedule": section("LambdaLR", lr_lambda={"target": f"{HERE}:late"})},
     "schedule", ["ValueError: late", "_settings.py"]),
    ({"schedule": section(f"{HERE}:Raising")}, "schedule", ["ZeroDivisionError: mine", "at step 3"]),
    ({"schedule": section("ExponentialLR", gamma="fast")}, "schedule.args.gamma", ["takes float", "'fast'"]),
    ({"optimizer": section("AdamW", betas=[0.9, 0.99, 0.999])}, "optimizer.args", ["AdamW raised ValueError", "first update"]),
    ({"optimizer": section("Adam", betas=[0.9])}, "optimizer.args", ["Adam raised"]),
    ({"optimizer": section("Adam", betas=0.9)}, "optimizer.args", ["Adam raised"]),
    ({"optimizer": section("SGD", lr=-0.1)}, "optimizer.args", ["Invalid learning rate"]),
    ({"optimizer": section("SGD", lr=0.1, nesterov=True)}, "optimizer.args", ["Nesterov"]),
    ({"optimizer": section("Rprop", etas=[0.5, 1.2, 3])}, "optimizer.args", ["Rprop raised"]),
    ({"optimizer": section(f"{HERE}:RaisingOptimizer", lr=0.1)}, "optimizer", ["RaisingOptimizer raised KeyError: 'mine'"]),
    ({"compile": {"backend": "nowhere"}}, "compile", ["nowhere", "backends here", "inductor"]),
    ({"compile": {"mode": "nowhere"}}, "compile", ["nowhere", "max-autotune"]),
    # rates
    ({"schedule": section("ExponentialLR", gamma=-1.0)}, "schedule", ["-0.1 at step 2", "must not be negative"]),
    ({"schedule": section("CosineAnnealingLR", T_max=40, eta_min=-0.1)}, "schedule", ["must not be negative"]),
    ({"schedule": section("LinearLR", end_factor=0.5, start_factor=1.0) | {"interval": "epoch"},
      "optimizer": section("SGD", lr=float("nan"))}, "", ["rate"]),
    ({"schedule": section("ExponentialLR", gamma=1e30)}, "schedule", ["inf"]),
    # optimizer
    ({"optimizer": section("SGD", lr=0.1, momentum=1.0)}, "optimizer.args.momentum", ["grows without bound"]),
    ({"optimizer": section("RMSprop", momentum=1.5)}, "optimizer.args.momentum", ["1.5"]),
    ({"optimizer": section("AdamW", lr=0.1, weight_decay=10.0)}, "optimizer.args.weight_decay",
     ["times the learning rate 0.1 this"]),
    ({"optimizer": section("SGD", lr=0.1) | {"groups": [{"match": ["*"]}, {"match": ["bias"], "args": {"lr": 0.2}}]}},
     "optimizer.groups.1.match", ["already in optimizer.groups.0"]),
    ({"optimizer": section("SGD", lr=0.1) | {"groups": [{"match": ["bias"], "args": {"lr": -0.1}}]}},
     "optimizer.groups.0.args.lr", ["must not be negative"]),
    ({"optimizer": section("SGD", lr=True)}, "optimizer.args.lr", ["takes float", "not true"]),
    ({"schedule": section("ReduceLROnPlateau", factor=0) | {"monitor": "loss"}}, "schedule.args.factor", ["would be 0"]),
    ({"model": {"target": f"{HERE}:half"}, "precision": "fp16"}, "precision", ["float16 weights (weight)"]),
    ({"model": {"target": "torch.nn.LazyLinear", "args": {"out_features": 4}}}, "model", ["the model itself (LazyLinear)"]),
    # min and max
    ({"evaluation": {"metrics": {"accuracy": ACCURACY}}, "checkpoint": {"best": [{"metric": "accuracy", "mode": "min"}]}},
     "checkpoint.best.0.mode", ["higher is better for 'accuracy'", "write mode: max"]),
    ({"checkpoint": {"best": [{"metric": "loss", "mode": "max"}]}}, "checkpoint.best.0.mode", ["lower is better for 'loss'"]),
    ({"limit": {"steps": 40, "early_stopping": {"metric": "loss", "mode": "max"}}}, "limit.early_stopping.mode", ["lower"]),
    ({"schedule": section("ReduceLROnPlateau", mode="max") | {"monitor": "loss"}}, "schedule.args.mode", ["lower"]),
    ({"schedule": section("ReduceLROnPlateau") | {"monitor": "accuracy"}, "evaluation": {"metrics": {"accuracy": ACCURACY}}},
     "schedule.args.mode", ["is min, but higher"]),
    # after the end
    ({"averaging": {"kind": "swa", "start": "14 epochs"}}, "averaging.start", ["nothing would be averaged"]),
    ({"averaging": {"kind": "swa", "start": "3 steps"}, "limit": {"epochs": 1}}, "averaging.start", ["3 steps"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "key", "words"), REFUSED, ids=lambda value: value if isinstance(value, str) else ""
)
def test_what_cannot_be_meant_is_refused_before_training_with_its_line(
    tmp_path: Path, changes: dict[str, Any], key: str, words: list[str]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(configuration(tmp_path, **changes)))
    with pytest.raises(ConfigurationError) as caught:
        train(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:")
    assert f" {key}" in message
    for word in words:
        assert word in message


TOLD: list[tuple[dict[str, Any], list[str]]] = [
    ({"schedule": {"warmup_steps": 41}}, ["schedule.warmup_steps", "never reaches"]),
    ({"schedule": section("PolynomialLR")}, ["schedule", "rate 0 after step"]),
    ({"schedule": section("CosineAnnealingLR", T_max=15)}, ["rises again"]),
    ({"schedule": section("MultiStepLR", milestones=[41])}, ["never changes the learning rate", "40 steps"]),
    ({"schedule": section("MultiStepLR", milestones="5")}, ["never changes the learning rate"]),
    ({"schedule": section("StepLR", step_size=14) | {"interval": "epoch"}}, ["never changes the learning rate", "interval"]),
    ({"schedule": section("ExponentialLR", gamma=2.0)}, ["makes the learning rate grow from 0.1 to 5.5e+10"]),
    ({"optimizer": section("SGD", lr=0.0)}, ["nothing is trained"]),
    ({"optimizer": section("Adam", eps=0)}, ["optimizer.args.eps", "NaN"]),
    ({"optimizer": section("SGD", lr=1e-3, maximize=True)}, ["optimizer.args.maximize"]),
    ({"optimizer": section("SGD", lr=0.1) | {"groups": [{"match": ["bias"]}, {"match": ["*"]}]}}, ["groups.1", "bias"]),
    ({"evaluation": {"every": "41 steps"}, "checkpoint": {"best": [{"metric": "loss", "mode": "min"}]}},
     ["evaluation.every", "longer than the run", "checkpoint.best never"]),
    ({"evaluation": {"every": "15 epochs"}, "checkpoint": {"best": [{"metric": "loss", "mode": "min"}]}},
     ["evaluation.every", "checkpoint.best never"]),
    ({"limit": {"steps": 40, "early_stopping": {"metric": "loss", "mode": "min", "patience": 4}}}, ["never stop early"]),
    ({"schedule": section("ReduceLROnPlateau", patience=4) | {"monitor": "loss"}}, ["never lowered"]),
    ({"averaging": {"kind": "swa", "start": "1 step"}, "limit": {"steps": 2}, "evaluation": {}}, ["averaging.every"]),
    ({"averaging": {"kind": "swa", "start": "10 epochs", "learning_rate": 0.1, "anneal": {"epochs": 5}}}, ["averaging.anneal"]),
    ({"divergence": {"spike": {"window": 40}}}, ["divergence.spike.window"]),
    ({"model": {"target": "tests.test_additivity:Net", "freeze": ["0.*"], "unfreeze": [{"epoch": 15, "match": ["0.*"]}]}},
     ["model.unfreeze.0.epoch"]),
    # data that is prepared otherwise
    ({"data": {"train": section(f"{HERE}:Scaled", scale=2.0), "validation": section(f"{HERE}:Scaled")}},
     ["data.validation: has no scale, which data.train has"]),
]  # fmt: skip


def found(changes: dict[str, Any]) -> list[str]:
    """Return what the check says of a configuration, whose parts are built and not run."""
    builder = Builder(load(configuration(Path("unused"), **changes)))
    data = builder.training_data()
    module = TrainingModule(builder.model(), builder.objective())
    builder.freezing(module).unfreeze_all()
    optimizer = StandIn(builder.optimizer(module))
    schedule = builder.schedule.build(optimizer, builder.schedule.length(data))
    return list(check_settings(builder, module, optimizer, schedule, data, processes=1))


@pytest.mark.parametrize(("changes", "words"), TOLD, ids=lambda value: value[0] if isinstance(value, list) else "")
def test_what_might_not_be_meant_is_one_line(changes: dict[str, Any], words: list[str]) -> None:
    (line,) = found(changes)
    assert all(word in line for word in words)


def test_a_run_warns_at_its_first_start_and_not_with_checks_off(tmp_path: Path) -> None:
    changes = {"optimizer": section("SGD", lr=0.0), "limit": {"steps": 2}}
    train(configuration(tmp_path, **changes))
    (line,) = warned(tmp_path)
    assert "nothing is trained" in line
    train(configuration(tmp_path, **{**changes, "limit": {"steps": 3}}))
    assert warned(tmp_path) == [line]
    train(configuration(tmp_path / "off", checks="off", **changes))
    assert warned(tmp_path / "off") == []
    changes["checkpoint"] = {"best": [{"metric": "loss", "mode": "max"}]}  # a key that may change
    with pytest.raises(ConfigurationError, match="write mode: min"):
        train(configuration(tmp_path, **{**changes, "limit": {"steps": 4}}))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"evaluation": {"every": "41 steps"}},  # at the run's end everything is due
        {"checkpoint": {"every": "15 epochs"}},
        {"reporting": {"every": "41 steps"}},
        {"data": {name: section(f"{HERE}:Scaled", scale=2.0) for name in ("train", "validation", "test")}},
        {"data": {"train": f"{HERE}:Scaled", "validation": section(f"{HERE}:Scaled", scale=2.0)}},
        {"schedule": section("CosineAnnealingLR") | {"warmup_steps": 4}, "averaging": {}},
        {"schedule": section("CosineAnnealingLR") | {"warmup_steps": 30}},
        {"schedule": {"warmup_steps": 10}},
        {"schedule": section("OneCycleLR", max_lr=0.1)},
        {"schedule": section("OneCycleLR", max_lr=10.0, div_factor=1000.0)},
        {"schedule": section("WarmupStableDecay")},
        {"schedule": section("CosineAnnealingWarmRestarts", T_0=10)},
        {"schedule": section("StepLR", step_size=3) | {"interval": "epoch"}},
        {"schedule": section("StepLR", step_size=3), "limit": {"steps": 1}, "evaluation": {}},
        {"schedule": section("ReduceLROnPlateau", patience=1) | {"monitor": "loss"}},
        {"schedule": section("LinearLR", start_factor=0.01, total_iters=39)},
        {"averaging": {"kind": "swa", "start": "10 epochs", "learning_rate": 0.05, "anneal": {"epochs": 2}}},
        {
            "optimizer": section("SGD", lr=0.1, momentum=0.9)
            | {"groups": [{"match": ["bias"], "args": {"weight_decay": 0.1}}]}
        },
        {
            "evaluation": {"metrics": {"accuracy": ACCURACY}},
            "checkpoint": {"best": [{"metric": "accuracy", "mode": "max"}]},
        },
    ],
    ids=lambda changes: next(iter(changes), "plain"),
)
def test_ordinary_settings_are_not_warned_of(changes: dict[str, Any]) -> None:
    assert found(changes) == []


def test_many_workers_on_few_cores_are_told_by_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.yaml"
    changes = {"data": {"train": "tests.test_additivity:points", "loader": {"num_workers": 640}}}
    path.write_text(yaml.safe_dump(configuration(tmp_path, schedule={"warmup_steps": 50}, **changes)))
    assert cli.main(["show", str(path)]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "data.loader.num_workers: 640 workers" in told
    assert "schedule.warmup_steps: 50 updates" in told
    assert cli.main(["show", str(path), "schedule={target: ExponentialLR, args: {gamma: -1}}"]) == 2


@pytest.mark.parametrize("target", ["torch.optim.lr_scheduler:StepLR", "torch.optim.lr_scheduler.StepLR"])
def test_a_schedule_within_another_ones_arguments_is_built_and_resumed(tmp_path: Path, target: str) -> None:
    schedule = section(f"{HERE}:Wrapping", after=section(target, step_size=2, gamma=0.1))
    whole = train(configuration(tmp_path / "whole", schedule=schedule)).model
    train(configuration(tmp_path, schedule=schedule, limit={"steps": 3}))
    resumed = train(configuration(tmp_path, schedule=schedule)).model
    pairs = zip(whole.parameters(), resumed.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    wrong = section(f"{HERE}:Wrapping", after=section(target, step=2))
    with pytest.raises(ConfigurationError, match=r"schedule\.args\.after\.args\.step: StepLR has no argument 'step'"):
        train(configuration(tmp_path / "wrong", schedule=wrong))
