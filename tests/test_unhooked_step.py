"""Leaving out torch's wrapper around an optimizer's step changes no result, and gives way to hooks and profilers."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR

from runtime.strategies.unhooked_step import unhooked_step

pytestmark = pytest.mark.single


def made(optimizer_class: Any = torch.optim.AdamW, **args: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return model, optimizer_class(model.parameters(), lr=0.1, **args)


@pytest.mark.parametrize(
    "optimizer_class", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.NAdam]
)
def test_it_is_the_same_step(optimizer_class: Any) -> None:
    (usual, optimizer), (bare, other) = made(optimizer_class), made(optimizer_class)
    step = unhooked_step(other)
    for _ in range(3):
        optimizer.step()
        step()
    for expected, got in zip(usual.parameters(), bare.parameters(), strict=True):
        assert torch.equal(expected, got) and not got.grad_fn


def test_hooks_registered_later_are_called() -> None:
    _, optimizer = made()
    step, called = unhooked_step(optimizer), []
    step()
    optimizer.register_step_post_hook(lambda *_: called.append(1))
    step()
    assert called == [1]


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")  # torch 2.11
def test_a_profiler_sees_the_step() -> None:
    _, optimizer = made()
    step = unhooked_step(optimizer)
    with torch.profiler.profile() as profile:
        step()
    assert any("Optimizer.step#AdamW" in event.key for event in profile.key_averages())


def test_schedulers_know_that_there_was_a_step() -> None:
    _, optimizer = made()
    scheduler = StepLR(optimizer, 1)
    step = unhooked_step(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)


def test_a_users_step_is_left_as_it_is() -> None:
    called = []

    class Own(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            called.append(1)
            return super().step(closure)

    _, optimizer = made(Own)
    unhooked_step(optimizer)()
    _, replaced = made()
    replaced.step = lambda: called.append(2)  # type: ignore[assignment, method-assign]
    unhooked_step(replaced)()
    assert called == [1, 2]
