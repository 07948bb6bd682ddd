"""No gradient is not a gradient of zeros, and no update is made of gradients that are not the global batch's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import SGD

from runtime.errors import GradientError
from runtime.optimization.latecomers import Latecomers
from tests.observed import configuration, largest_difference, observe
from tests.process_pool import ProcessPool

ADAMW = {"target": "AdamW", "args": {"lr": 0.05, "weight_decay": 0.5}}  # decay moves what has a gradient of zeros
MOMENTUM = {"target": "SGD", "args": {"lr": 0.05, "momentum": 0.9, "dampening": 0.25, "weight_decay": 0.1}}
SEARCHED = {"ddp": {"find_unused_parameters": True}}


def branches(folder: Path, uses: str, **changes: Any) -> dict[str, Any]:
    """Three slots, so that with two processes one of them runs a filler; parts of the model are used by some slots only."""
    model = {"target": "tiny_branches:Branches", "args": {"uses": uses}}
    sections = {"model": model, "batch": {"global_size": 12, "slots": 3}, "limit": {"steps": 8}, "checks": "off"}
    return configuration(folder, **{**sections, **changes})


@pytest.fixture(scope="module")
def alone(pool: ProcessPool, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What one process makes of a model and an optimizer."""
    known: dict[str, Any] = {}

    def trained(uses: str, optimizer: dict[str, Any], **changes: Any) -> dict[str, Any]:
        key = repr((uses, optimizer, changes))
        if key not in known:
            folder = tmp_path_factory.mktemp("alone")
            known[key] = pool.run(observe, 1, branches(folder, uses, optimizer=optimizer, **changes))[0]
        return known[key]

    return trained


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("uses", ["some", "never", "late"])
@pytest.mark.parametrize("optimizer", [ADAMW, MOMENTUM], ids=["AdamW", "SGD"])
def test_parameters_without_a_gradient_are_left_alone_on_any_number_of_processes(
    pool: ProcessPool, tmp_path: Path, alone: Any, world_size: int, uses: str, optimizer: dict[str, Any]
) -> None:
    config = branches(tmp_path, uses, optimizer=optimizer, strategy=SEARCHED)
    assert largest_difference(alone(uses, optimizer), pool.run(observe, world_size, config)[0]) < 1e-12


@pytest.mark.parametrize(
    ("world_size", "uses", "strategy"),
    [
        (2, "some", {"kind": "fsdp"}),
        (3, "some", {"kind": "fsdp"}),
        (2, "never", {"kind": "fsdp", "fsdp": {"no_sync": True}}),
        (2, "some", {"ddp": {**SEARCHED["ddp"], "gradient_as_bucket_view": False}}),
    ],
)
def test_other_strategies_leave_them_alone_as_well(
    pool: ProcessPool, tmp_path: Path, alone: Any, world_size: int, uses: str, strategy: dict[str, Any]
) -> None:
    got = pool.run(observe, world_size, branches(tmp_path, uses, optimizer=ADAMW, strategy=strategy))[0]
    assert largest_difference(alone(uses, ADAMW), got) < 1e-12


def test_an_output_that_no_loss_looks_at_is_no_use_of_its_parameters(
    pool: ProcessPool, tmp_path: Path, alone: Any
) -> None:
    model = {"target": "tiny_branches:Branches", "args": {"uses": "some", "aux": True}, "output": "logits"}
    config = branches(tmp_path, "", model=model, optimizer=ADAMW, strategy=SEARCHED)
    assert largest_difference(alone("some", ADAMW), pool.run(observe, 2, config)[0]) < 1e-12


def incomplete(config: dict[str, Any]) -> tuple[str, int]:
    """Train, and return the error and how many updates were made."""
    from runtime.strategies.ddp import DDPStrategy

    updates: list[bool] = []
    prepare = DDPStrategy.prepare

    def noting(self: Any, module: Any, optimizer: Any, *, slots: int) -> None:
        prepare(self, module, optimizer, slots=slots)
        step = self._optimizer_step

        def counted() -> None:
            updates.append(True)
            step()

        self._optimizer_step = counted

    DDPStrategy.prepare = noting  # type: ignore[method-assign]
    try:
        observe(config)
    except GradientError as error:
        return str(error), len(updates)
    finally:
        DDPStrategy.prepare = prepare  # type: ignore[method-assign]
    return "trained", len(updates)


@pytest.mark.parametrize("steps", [1, 3])
def test_an_update_is_refused_where_gradients_were_not_reduced_also_in_the_last_step(
    pool: ProcessPool, tmp_path: Path, steps: int
) -> None:
    config = branches(tmp_path, "never", batch={"global_size": 16, "slots": 4}, limit={"steps": steps})
    for message, updates in pool.run(incomplete, 2, config):
        assert updates == 0
        assert "first.weight, first.bias, second.weight, second.bias got no gradient" in message
        assert "strategy.ddp.find_unused_parameters: true" in message
    assert not list((tmp_path / "checkpoints").glob("step-*"))  # what is not reduced is not saved


@pytest.mark.single
def test_a_gradient_that_comes_late_updates_as_torch_does_without_its_fused_kernel() -> None:
    made = {}
    for fused in (True, False):
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(3)) for _ in range(3)]
        optimizer = SGD(parameters, 0.1, momentum=0.9, dampening=0.3, weight_decay=0.1, fused=fused)
        latecomers = Latecomers(optimizer)
        for with_gradient in ([0], [0, 1], [1], [0, 1, 2], [0, 1, 2]):
            for number in with_gradient:
                parameters[number].grad = torch.randn(3)
            latecomers.update()
            optimizer.step()
            optimizer.zero_grad()
        made[fused] = parameters
    for ours, torchs in zip(made[True], made[False], strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.single), 2])
def test_parameters_are_unfrozen_under_sgd_with_momentum(pool: ProcessPool, tmp_path: Path, world_size: int) -> None:
    """Fused on a CPU, as any optimizer that is; the reference says that it is not."""
    model = {"target": "tiny:Mlp", "args": {}, "freeze": ["net.0.*"], "unfreeze": [{"epoch": 2, "match": ["net.0.*"]}]}
    changes = {"model": model, "limit": {"epochs": 3}}
    args = {"lr": 0.05, "momentum": 0.9}
    plain = {"target": "SGD", "args": {**args, "fused": False}}
    expected = pool.run(observe, 1, configuration(tmp_path / "plain", **changes, optimizer=plain))[0]
    fused = {"target": "SGD", "args": args}
    got = pool.run(observe, world_size, configuration(tmp_path / "fused", **changes, optimizer=fused))[0]
    assert largest_difference(expected, got) < 1e-10
