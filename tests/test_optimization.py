"""Groups, fused kernels and schedules, against torch driven by hand."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, lr_scheduler

from runtime.errors import DivergenceError
from runtime.optimization import Schedule, fused_arguments, length_argument
from runtime.serialization import join_state, split_state

pytestmark = pytest.mark.single


def optimizer(*rates: float) -> SGD:
    return SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates or (0.1,)], momentum=0.9)


def quiet(step: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch misses the optimizer's steps
        step()


SCHEDULES: list[tuple[str, dict[str, Any]]] = [
    ("LambdaLR", {"lr_lambda": lambda i: 0.9**i}),
    ("StepLR", {"step_size": 3}),
    ("MultiStepLR", {"milestones": [2, 5]}),
    ("ExponentialLR", {"gamma": 0.9}),
    ("CosineAnnealingLR", {"T_max": 7}),
    ("CosineAnnealingWarmRestarts", {"T_0": 3}),
    ("OneCycleLR", {"max_lr": 0.5, "total_steps": 40}),
    ("PolynomialLR", {"total_iters": 9, "power": 2.0}),
    ("LinearLR", {}),
    ("CyclicLR", {"base_lr": 0.01, "max_lr": 0.1}),
]


@pytest.mark.parametrize(("name", "args"), SCHEDULES, ids=[name for name, _ in SCHEDULES])
@pytest.mark.parametrize("warmup", [0, 4])
def test_after_the_warm_up_the_rate_is_torchs_and_it_resumes_at_every_step(
    name: str, args: dict[str, Any], warmup: int
) -> None:
    alone = optimizer(0.1, 0.02)
    scheduler = getattr(lr_scheduler, name)(alone, **args)
    expected = []
    for _ in range(12):
        expected.append([group["lr"] for group in alone.param_groups])
        quiet(scheduler.step)

    def make() -> tuple[SGD, Schedule]:
        made = optimizer(0.1, 0.02)
        return made, Schedule(made, getattr(lr_scheduler, name)(made, **args), warmup_steps=warmup)

    ours, schedule = make()
    for step in range(12 + warmup):
        factor = min(1.0, (step + 1) / warmup) if warmup else 1.0
        base = expected[max(0, step - warmup)]
        assert schedule.learning_rates == pytest.approx([rate * factor for rate in base], rel=1e-12)
        quiet(schedule.after_update)
        # a resumed process builds new objects, loads the optimizer first, and goes on from any step
        tree, tensors = split_state({"optimizer": ours.state_dict(), "schedule": schedule.state_dict()})
        state = join_state(tree, tensors)
        ours, schedule = make()
        ours.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])


def test_a_schedule_by_epoch_ignores_updates() -> None:
    ours = optimizer(1.0)
    schedule = Schedule(ours, lr_scheduler.StepLR(ours, step_size=1, gamma=0.5), interval="epoch")
    for _ in range(5):
        schedule.after_update()
    assert schedule.learning_rates == [1.0]
    quiet(schedule.after_epoch)
    assert schedule.learning_rates == [0.5]


def test_a_plateau_scheduler_steps_once_per_evaluation_behind_its_warm_up() -> None:
    ours = optimizer(1.0)
    plateau = lr_scheduler.ReduceLROnPlateau(ours, factor=0.1, patience=0)
    schedule = Schedule(ours, plateau, warmup_steps=2, monitor="loss")
    schedule.after_evaluation({"loss": 1.0})
    schedule.after_evaluation({"loss": 2.0})
    assert schedule.learning_rates == [0.5]  # warming up
    schedule.after_update()
    schedule.after_update()
    assert schedule.learning_rates == [1.0]
    for value in (1.0, 2.0):
        schedule.after_evaluation({"loss": value})
    assert schedule.learning_rates == pytest.approx([0.1])


def test_the_length_of_the_run_is_filled_in_only_where_it_is_required() -> None:
    assert length_argument(lr_scheduler.CosineAnnealingLR, {}) == "T_max"
    assert length_argument(lr_scheduler.CosineAnnealingLR, {"T_max": 3}) is None
    assert length_argument(lr_scheduler.OneCycleLR, {"max_lr": 1}) == "total_steps"
    assert length_argument(lr_scheduler.OneCycleLR, {"epochs": 1, "steps_per_epoch": 2}) is None
    assert length_argument(lr_scheduler.PolynomialLR, {}) is None  # it has a default of its own
    assert length_argument(lr_scheduler.StepLR, {}) is None


def test_fused_is_chosen_where_torch_has_it_and_the_user_did_not_choose() -> None:
    parameters = [nn.Parameter(torch.zeros(2))]
    assert fused_arguments(AdamW, {}, parameters) == {"fused": True}
    assert fused_arguments(AdamW, {"foreach": True}, parameters) == {}
    assert fused_arguments(AdamW, {"fused": False}, parameters) == {}
    assert fused_arguments(torch.optim.RMSprop, {}, parameters) == {}
    assert fused_arguments(AdamW, {}, [nn.Parameter(torch.zeros(2, dtype=torch.complex64))]) == {}


@pytest.mark.parametrize("rate", [float("nan"), float("inf")])
def test_a_learning_rate_that_is_no_number_is_refused_before_a_step(rate: float) -> None:
    with pytest.raises(DivergenceError, match="learning rate"):
        Schedule(optimizer(rate))
