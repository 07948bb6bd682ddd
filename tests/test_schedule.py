"""Schedules, against torch driven by hand."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer, lr_scheduler

from runtime.checkpoints.serialization import join_state, split_state
from runtime.config import component
from runtime.config.component import ComponentError
from runtime.errors import DivergenceError, EvaluationError
from runtime.optimization import schedulers
from runtime.optimization.schedule import Schedule
from runtime.optimization.schedulers import WarmupStableDecay, length_argument
from tests.observed import PROJECT
from tests.project import tiny_schedules as tiny

UPDATES, PER_EPOCH = 24, 3


@pytest.fixture(autouse=True)
def _code_folder() -> None:
    component.add_code_folder(Path(PROJECT))


def optimizer(*rates: float, kind: type[Optimizer] = SGD) -> Optimizer:
    args: dict[str, Any] = {"momentum": 0.9} if kind is SGD else {}
    return kind([{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates or (0.1,)], **args)


def quiet(step: Callable[[], None]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch misses the optimizer's steps
        step()


def by_hand(name: str, args: dict[str, Any]) -> Callable[[Optimizer], Any]:
    return lambda o: getattr(lr_scheduler, name)(o, **args)


def chained(o: Optimizer) -> Any:
    return lr_scheduler.ChainedScheduler([lr_scheduler.ExponentialLR(o, 0.9), lr_scheduler.ConstantLR(o, 0.5, 4)])


def sequential(o: Optimizer) -> Any:
    inner = [lr_scheduler.ConstantLR(o, 0.1, 20), lr_scheduler.CosineAnnealingLR(o, 5), lr_scheduler.StepLR(o, 2, 0.5)]
    return lr_scheduler.SequentialLR(o, inner, milestones=[3, 9])


def chain_of_a_sequence(o: Optimizer) -> Any:
    inner = [lr_scheduler.ConstantLR(o, 0.5, 2), lr_scheduler.ExponentialLR(o, 0.9)]
    return lr_scheduler.ChainedScheduler([lr_scheduler.SequentialLR(o, inner, [3]), lr_scheduler.StepLR(o, 5)])


def within(name: str, **args: Any) -> dict[str, Any]:
    return {"target": name, "args": args}


# Arguments as in a YAML; the second is torch by hand, where those differ.
SCHEDULES: list[tuple[str, dict[str, Any], Callable[[Optimizer], Any] | None]] = [
    ("LambdaLR", {"lr_lambda": {"target": "tiny_schedules:falling"}}, by_hand("LambdaLR", {"lr_lambda": tiny.falling})),
    (
        "LambdaLR",
        {"lr_lambda": [{"target": "tiny_schedules:falling"}, within("tiny_schedules:Power", base=0.8)]},
        lambda o: lr_scheduler.LambdaLR(o, [tiny.falling, tiny.Power(0.8)]),
    ),
    (
        "MultiplicativeLR",
        {"lr_lambda": {"target": "tiny_schedules:shrinking"}},
        by_hand("MultiplicativeLR", {"lr_lambda": tiny.shrinking}),
    ),
    ("StepLR", {"step_size": 3}, None),
    ("MultiStepLR", {"milestones": [2, 5]}, None),
    ("ConstantLR", {"factor": 0.5, "total_iters": 4}, None),
    ("LinearLR", {"total_iters": 6}, None),
    ("ExponentialLR", {"gamma": 0.9}, None),
    ("CosineAnnealingLR", {"T_max": 7, "eta_min": 0.001}, None),
    ("CosineAnnealingWarmRestarts", {"T_0": 3, "T_mult": 2}, None),
    ("OneCycleLR", {"max_lr": [0.5, 0.3], "total_steps": 40}, None),
    ("OneCycleLR", {"max_lr": 0.5, "epochs": 3, "steps_per_epoch": 10, "three_phase": True}, None),
    ("PolynomialLR", {"total_iters": 9, "power": 2.0}, None),
    ("CyclicLR", {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 4, "mode": "triangular2"}, None),
    ("CyclicLR", {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 2, "mode": "exp_range", "gamma": 0.9}, None),
    (
        "CyclicLR",
        {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 3, "scale_fn": {"target": "tiny_schedules:slower"}},
        by_hand("CyclicLR", {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 3, "scale_fn": tiny.slower}),
    ),
    (
        "ChainedScheduler",
        {"schedulers": [within("ExponentialLR", gamma=0.9), within("ConstantLR", factor=0.5, total_iters=4)]},
        chained,
    ),
    (
        "SequentialLR",
        {
            "schedulers": [
                within("ConstantLR", factor=0.1, total_iters=20),
                within("CosineAnnealingLR", T_max=5),
                within("StepLR", step_size=2, gamma=0.5),
            ],
            "milestones": [3, 9],
        },
        sequential,
    ),
    (
        "ChainedScheduler",
        {
            "schedulers": [
                within(
                    "SequentialLR",
                    schedulers=[within("ConstantLR", factor=0.5, total_iters=2), within("ExponentialLR", gamma=0.9)],
                    milestones=[3],
                ),
                within("StepLR", step_size=5),
            ]
        },
        chain_of_a_sequence,
    ),
    ("tiny_schedules:as_a_function", {"steps": 20}, lambda o: tiny.as_a_function(o, 20)),
]  # fmt: skip


def test_every_scheduler_of_torch_is_tested() -> None:
    tested = {name for name, _, _ in SCHEDULES} | {"ReduceLROnPlateau"}
    assert set(lr_scheduler.__all__) - {"LRScheduler"} <= tested  # LRScheduler is their base


def shown(o: Optimizer) -> list[dict[str, Any]]:
    return [{key: group[key] for key in ("lr", "momentum", "betas") if key in group} for group in o.param_groups]


def resumed(make: Callable[[], tuple[Optimizer, Schedule]], ours: Optimizer, schedule: Schedule) -> Any:
    """A new process builds new objects, loads the optimizer first, and goes on."""
    tree, tensors = split_state({"optimizer": ours.state_dict(), "schedule": schedule.state_dict()})
    state = join_state(tree, tensors)
    ours, schedule = make()
    ours.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    return ours, schedule


def expectations(
    scheduler: Any, o: Optimizer, warmup: int, interval: str, warm: Callable[[int], float]
) -> Iterator[list[dict[str, Any]]]:
    """What torch shows before each update, when it is stepped by hand after the warm-up."""
    for update in range(UPDATES):
        yield [{**group, "lr": group["lr"] * warm(update)} for group in shown(o)]
        epoch_ends = (update + 1) % PER_EPOCH == 0
        if update >= warmup if interval == "step" else epoch_ends and update + 1 >= warmup:
            quiet(scheduler.step)


@pytest.mark.parametrize(("interval", "kind"), [("step", SGD), ("epoch", AdamW)])
@pytest.mark.parametrize("warmup", [0, 4])
@pytest.mark.parametrize(("name", "args", "truth"), SCHEDULES, ids=[name for name, _, _ in SCHEDULES])
def test_after_the_warm_up_rate_and_momentum_are_torchs_and_resume_at_every_step(
    name: str, args: dict[str, Any], truth: Any, warmup: int, interval: Any, kind: type[Optimizer]
) -> None:
    alone = optimizer(0.1, 0.02, kind=kind)
    by_torch = (truth or by_hand(name, args))(alone)

    def make() -> tuple[Optimizer, Schedule]:
        made = optimizer(0.1, 0.02, kind=kind)
        scheduler = schedulers.build(name, args, made, code=Path(PROJECT))
        return made, Schedule(made, scheduler, interval=interval, warmup_steps=warmup)

    def warm(update: int) -> float:
        return min(1.0, (update + 1) / warmup) if warmup else 1.0

    ours, schedule = make()
    whole, uninterrupted = make()
    for update, expected in enumerate(expectations(by_torch, alone, warmup, interval, warm)):
        assert shown(ours) == shown(whole) == expected, update
        for each in (schedule, uninterrupted):
            quiet(each.after_update)
            if (update + 1) % PER_EPOCH == 0:
                quiet(each.after_epoch)
        ours, schedule = resumed(make, ours, schedule)


@pytest.mark.parametrize("shape", ["linear", "cosine", "sqrt"])
@pytest.mark.parametrize(("decay", "decays"), [(0.25, 5), (5, 5), (1, 1), (1.0, 20), (0.01, 1)])
def test_warm_up_stable_decay_is_its_formula(shape: str, decay: float, decays: int) -> None:
    formula = {
        "linear": lambda x: 1 - x,
        "cosine": lambda x: math.cos(math.pi * x / 2) ** 2,
        "sqrt": lambda x: 1 - x**0.5,
    }

    def make() -> tuple[Optimizer, Schedule]:
        made = optimizer(0.1, 0.02)
        args = {"total_iters": 20, "decay": decay, "shape": shape, "final": 0.1}
        return made, Schedule(made, schedulers.build("WarmupStableDecay", args, made), warmup_steps=4)

    ours, schedule = make()
    for update in range(4 + 20 + 3):
        count = min(20, max(0, update - 4))
        x = max(0.0, (count - (20 - decays)) / decays)
        factor = min(1.0, (update + 1) / 4) * (0.1 + 0.9 * formula[shape](x))
        assert schedule.learning_rates == pytest.approx([0.1 * factor, 0.02 * factor], rel=1e-12), update
        quiet(schedule.after_update)
        ours, schedule = resumed(make, ours, schedule)


def test_a_stable_run_that_is_made_longer_stays_stable_for_longer() -> None:
    def make(total: int) -> tuple[Optimizer, Schedule]:
        made = optimizer(1.0)
        return made, Schedule(made, WarmupStableDecay(made, total, decay=5))

    ours, schedule = make(10)
    for _ in range(4):
        quiet(schedule.after_update)
    ours, schedule = resumed(lambda: make(20), ours, schedule)
    rates = []
    for _ in range(16):
        rates.append(schedule.learning_rates[0])
        quiet(schedule.after_update)
    assert rates == pytest.approx([1.0] * 12 + [0.8, 0.6, 0.4, 0.2])


@pytest.mark.parametrize("args", [{"decay": 0}, {"decay": 21}, {"decay": 1.5}, {"shape": "square"}, {"final": 1.0}])
def test_warm_up_stable_decay_refuses_what_it_cannot_do(args: dict[str, Any]) -> None:
    with pytest.raises(ComponentError, match=next(iter(args))):
        schedulers.build("WarmupStableDecay", {"total_iters": 20, **args}, optimizer())


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("cooldown", [0, 1])
def test_a_plateau_scheduler_steps_once_per_evaluation_and_resumes_at_every_one(warmup: int, cooldown: int) -> None:
    args: dict[str, Any] = {"factor": 0.1, "patience": 1, "cooldown": cooldown, "mode": "max"}
    losses = [0.1, 0.5, 0.4, 0.3, 0.2, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    alone = optimizer(1.0, 0.2)
    by_torch = lr_scheduler.ReduceLROnPlateau(alone, **args)

    def make() -> tuple[Optimizer, Schedule]:
        made = optimizer(1.0, 0.2)
        scheduler = schedulers.build("ReduceLROnPlateau", args, made)
        return made, Schedule(made, scheduler, warmup_steps=warmup, monitor="accuracy")

    ours, schedule = make()
    for number, loss in enumerate(losses):
        factor = min(1.0, (number + 1) / warmup) if warmup else 1.0
        assert schedule.learning_rates == [group["lr"] * factor for group in alone.param_groups]
        if number >= warmup:
            by_torch.step(loss)
        schedule.after_evaluation({"loss": 1 - loss, "accuracy": loss})
        schedule.after_update()
        schedule.after_epoch()
        ours, schedule = resumed(make, ours, schedule)
    assert alone.param_groups[0]["lr"] < 1.0


def test_a_result_that_is_no_number_cannot_be_watched() -> None:
    ours = optimizer()
    schedule = Schedule(ours, lr_scheduler.ReduceLROnPlateau(ours), monitor="confusion")
    with pytest.raises(EvaluationError, match=r"schedule.monitor: 'confusion'"):
        schedule.after_evaluation({"confusion": [1.0, 2.0]})


def test_arguments_that_may_change_count_from_the_change_on() -> None:
    def make(rate: float, gamma: float) -> tuple[Optimizer, Schedule]:
        made = optimizer(rate)
        return made, Schedule(made, lr_scheduler.StepLR(made, step_size=2, gamma=gamma))

    ours, schedule = make(1.0, 0.1)
    for _ in range(2):
        quiet(schedule.after_update)
    ours, schedule = resumed(lambda: make(2.0, 0.5), ours, schedule)
    rates = []
    for _ in range(4):
        rates.append(schedule.learning_rates[0])
        quiet(schedule.after_update)
    assert rates == pytest.approx([0.2, 0.2, 0.1, 0.1])


@pytest.mark.parametrize(
    ("target", "args", "path", "words"),
    [
        ("LambdaLR", {"lr_lambda": "lambda i: 0.9 ** i"}, ("args", "lr_lambda"), "text is not evaluated"),
        ("CyclicLR", {"base_lr": 0.1, "max_lr": 1, "scale_fn": "mine"}, ("args", "scale_fn"), "text is not evaluated"),
        ("StepLR", {"step": 1}, ("args", "step"), "did you mean 'step_size'"),
        ("StepsLR", {}, ("target",), "did you mean 'StepLR'"),
        ("SequentialLR", {"schedulers": {}, "milestones": []}, ("args", "schedulers"), "list"),
        ("SequentialLR", {"schedulers": ["StepLR"], "milestones": []}, ("args", "schedulers", "0"), "{target"),
        ("SequentialLR", {"schedulers": []}, ("args",), "'milestones'"),
        ("ChainedScheduler", {"schedulers": [within("StepLR")]}, ("args", "schedulers", "0", "args"), "'step_size'"),
        ("ChainedScheduler", {"schedulers": [within("XLR")]}, ("args", "schedulers", "0", "target"), "XLR"),
    ],
)
def test_a_mistake_is_found_without_calling_anything(
    target: str, args: dict[str, Any], path: tuple[str, ...], words: str
) -> None:
    found = schedulers.check(target, args)
    assert any(mistake.path == path and words in mistake.what for mistake in found), [(m.path, m.what) for m in found]


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("milestones", [[2, 4], [2, 6], [3, 9]])
def test_a_sequence_within_a_sequence_gives_the_rates_of_one_sequence(place: int, milestones: list[int]) -> None:
    """Torch's own begins the inner one at another count, or raises. The expected rates follow from each scheduler alone."""
    parts = [within("ConstantLR", factor=0.1, total_iters=20), within("ExponentialLR", gamma=0.5)]
    others = [within("LinearLR", start_factor=0.2, total_iters=3), within("StepLR", step_size=2)]
    inner = within("SequentialLR", schedulers=parts, milestones=[3])
    outer = [*others[:place], inner, *others[place:]]
    ours = optimizer()
    nested = schedulers.build("SequentialLR", {"schedulers": outer, "milestones": milestones}, ours)

    def alone(part: dict[str, Any], count: int) -> float:
        its = optimizer()
        scheduler = schedulers.build(part["target"], part["args"], its)
        for _ in range(count):
            quiet(scheduler.step)
        return float(its.param_groups[0]["lr"])

    for step in range(12):
        which = sum(step >= milestone for milestone in milestones)
        count = step - [0, *milestones][which]
        if which == place:
            second = count >= 3
            expected = alone(parts[second], count - 3 * second)
        else:
            expected = alone(outer[which], count)
        assert ours.param_groups[0]["lr"] == pytest.approx(expected), step
        quiet(nested.step)


def test_a_chain_within_a_sequence_is_refused() -> None:
    args = {"schedulers": [within("ChainedScheduler", schedulers=[within("StepLR", step_size=2)])], "milestones": []}
    (mistake,) = schedulers.check("SequentialLR", args)
    assert mistake.path == ("args", "schedulers", "0", "target")
    assert "ChainedScheduler of SequentialLRs" in mistake.what


def test_a_scheduler_within_that_raises_is_named_by_its_place() -> None:
    args = {"schedulers": [within("StepLR", step_size=1), within("OneCycleLR", max_lr=1)], "milestones": [3]}
    with pytest.raises(ComponentError, match="OneCycleLR raised ValueError") as raised:
        schedulers.build("SequentialLR", args, optimizer())
    assert raised.value.path == ("args", "schedulers", "1", "args")
    args = {"schedulers": [within("ReduceLROnPlateau")]}
    with pytest.raises(ComponentError, match="does not support `ReduceLROnPlateau`"):
        schedulers.build("ChainedScheduler", args, optimizer())


def test_the_length_of_the_run_is_filled_in_only_where_it_is_required() -> None:
    assert length_argument(lr_scheduler.CosineAnnealingLR, {}) == "T_max"
    assert length_argument(lr_scheduler.CosineAnnealingLR, {"T_max": 3}) is None
    assert length_argument(lr_scheduler.OneCycleLR, {"max_lr": 1}) == "total_steps"
    assert length_argument(lr_scheduler.OneCycleLR, {"epochs": 1, "steps_per_epoch": 2}) is None
    assert length_argument(lr_scheduler.PolynomialLR, {}) is None  # it has a default of its own
    assert length_argument(lr_scheduler.StepLR, {}) is None
    assert length_argument(WarmupStableDecay, {}) == "total_iters"


@pytest.mark.parametrize("rate", [float("nan"), float("inf")])
def test_a_learning_rate_that_is_no_number_is_refused_before_a_step(rate: float) -> None:
    with pytest.raises(DivergenceError, match="learning rate"):
        Schedule(optimizer(rate))
