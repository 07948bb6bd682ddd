"""Buffers belong to a run's state: every kind resumes bit for bit, and is the same on any number of processes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from runtime.distributed.slot_reduction import RankReduction
from runtime.state.module_buffers import overlaps, preserved_buffers
from runtime.training.buffers import BufferRule
from tests.observed import assert_bitwise_equal, configuration, largest_difference, observe
from tests.process_pool import ProcessPool, RemoteError
from tests.test_resumption import observe_stopping

WORLDS = pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.single), 2])
MODELS: dict[str, dict[str, Any]] = {
    "unsaved": {"target": "tiny_buffers:Unsaved", "args": {}},
    "replaced": {"target": "tiny_buffers:Replaced", "args": {}},
    **{
        f"cached, {how}": {"target": "tiny_buffers:Cached", "args": {"how": how}}
        for how in ("saved", "unsaved", "none", "flag")
    },
    "late": {"target": "tiny_buffers:Late", "args": {}},
    "late, counting": {"target": "tiny_buffers:Late", "args": {"counts": True}},
    "every type": {"target": "tiny_buffers:Typed", "args": {}},
    "every type, constant": {"target": "tiny_buffers:Typed", "args": {"changes": False}},
}


def buffered(folder: Path, model: dict[str, Any], **changes: Any) -> dict[str, Any]:
    train = {"target": "tiny:points", "args": {"size": 64, "dtype": "float32"}}
    validation = {"target": "tiny:points", "args": {"split": "v", "size": 20, "dtype": "float32"}}
    return configuration(
        folder,
        **{
            "model": model,
            "data": {"train": train, "validation": validation},
            "evaluation": {"every": "6 steps"},
            "limit": {"steps": 6},
            **changes,
        },
    )


@WORLDS
@pytest.mark.parametrize("kind", MODELS)
def test_every_kind_of_buffer_resumes_bit_for_bit(
    pool: ProcessPool, tmp_path: Path, world_size: int, kind: str
) -> None:
    whole = pool.run(observe, world_size, buffered(tmp_path / "whole", MODELS[kind]))
    config = buffered(tmp_path / "resumed", MODELS[kind])
    assert pool.run(observe_stopping, world_size, config, 3)[0]["step"] == 3
    resumed = pool.run(observe, world_size, config)
    assert_bitwise_equal(whole[0], resumed[0])
    assert whole[0]["buffers"][-1] == resumed[0]["buffers"][-1]
    assert len({tuple(rank["buffers"]) for rank in whole}) == 1  # on all ranks, at each evaluation and save


@pytest.mark.parametrize("kind", ["unsaved", "replaced", "late", "late, counting", "every type"])
def test_buffers_that_are_not_saved_do_not_depend_on_the_number_of_processes(
    pool: ProcessPool, tmp_path: Path, kind: str
) -> None:
    runs = [pool.run(observe, size, buffered(tmp_path / str(size), MODELS[kind]))[0] for size in (1, 2, 3)]
    for other in runs[1:]:
        assert largest_difference(runs[0], other) < 1e-5
        for step, loss in runs[0]["losses"].items():
            assert other["losses"][step] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("kind", ["fsdp", "zero"])
def test_buffers_and_extra_state_resume_under_sharding(pool: ProcessPool, tmp_path: Path, kind: str) -> None:
    if kind == "zero":
        pytest.importorskip("deepspeed", reason="needs the extra deepspeed")
    strategy = {"kind": kind, **({"fsdp": {"min_parameters": 10}} if kind == "fsdp" else {})}
    for name, model in {
        "unsaved": MODELS["unsaved"],
        "extra": {"target": "tiny_buffers:Remembering", "args": {}},
    }.items():
        size = 1 if name == "extra" else 2  # extra state is the ranks' own
        whole = pool.run(observe, size, buffered(tmp_path / f"{name} whole", model, strategy=strategy))[0]
        config = buffered(tmp_path / name, model, strategy=strategy)
        assert pool.run(observe_stopping, size, config, 3)[0]["step"] == 3
        resumed = pool.run(observe, size, config)[0]
        assert {step: whole["losses"][step] for step in resumed["losses"]} == resumed["losses"]


@pytest.mark.single
def test_extra_state_of_plain_data_and_tensors_is_saved(pool: ProcessPool, tmp_path: Path) -> None:
    model = {"target": "tiny_buffers:Remembering", "args": {}}
    whole = pool.run(losses_of, 1, buffered(tmp_path / "whole", model))[0]
    config = buffered(tmp_path / "resumed", model)
    pool.run(observe_stopping_losses, 1, config, 3)
    resumed = pool.run(losses_of, 1, config)[0]
    assert {step: whole[step] for step in resumed} == resumed


def losses_of(config: dict[str, Any], observers: Sequence[Any] = ()) -> dict[int, float]:
    import json

    from runtime.session import train

    folder = train(config, observers=observers).folder
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {r["step"]: r["loss"] for r in records if r["event"] == "train"}


def observe_stopping_losses(config: dict[str, Any], after: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.test_resumption.observe", losses_of)
        observe_stopping(config, after)


@pytest.mark.single
@pytest.mark.parametrize("kind", ["set", "object", "function"])
def test_other_extra_state_is_refused_at_the_start_by_the_modules_name(
    pool: ProcessPool, tmp_path: Path, kind: str
) -> None:
    with pytest.raises(
        RemoteError, match=r"Memory \(net.memory\) has extra state \(get_extra_state\) that cannot be saved"
    ):
        pool.run(observe, 1, buffered(tmp_path, {"target": "tiny_buffers:Remembering", "args": {"kind": kind}}))
    assert not list(tmp_path.glob("checkpoints/*"))


@pytest.mark.single
@pytest.mark.parametrize("begins", [4, 5, 7])
@pytest.mark.parametrize("counted", [True, False])
def test_a_buffer_that_begins_to_change_later_follows_the_rule_from_then_on(begins: int, counted: bool) -> None:
    """A write that torch does not count is seen in the 8th step, where values are compared; no slot ever sees another's."""
    module: Any = nn.Module()
    module.register_buffer("late", torch.zeros(2), persistent=False)
    names: list[str] = []
    rule = BufferRule(module, RankReduction(range(2), world_size=1), moving=names)
    for step in range(1, 13):
        rule.begin_step()
        seen = module.late.tolist()
        for slot in range(2):
            if step >= begins:
                assert module.late.tolist() == seen or not counted
                (module.late if counted else module.late.data).add_(1 + slot)
            rule.end_slot(slot)
        rule.end_step(real_slots=2, skipped=False)
    free = 8 - begins if not counted and begins > 4 else 0  # steps in which both slots' changes stayed
    assert module.late.tolist() == [1.5 * (13 - begins - free) + 3 * free] * 2
    assert names == ["late"]


def late_values(steps: int) -> tuple[list[float], list[float]]:
    """Return what a buffer is after each step that begins to change in the fifth, and differently on each rank."""
    import torch.distributed as dist

    from runtime.distributed.collectives import gather_bytes

    dist.init_process_group("gloo")
    try:
        module: Any = nn.Module()
        module.register_buffer("late", torch.zeros(1), persistent=False)
        module.register_buffer("calls", torch.zeros(1), persistent=False)
        own = range(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
        rule = BufferRule(
            module, RankReduction(own, world_size=2), lambda told: gather_bytes(told, torch.device("cpu"))
        )
        values = []
        for step in range(1, steps + 1):
            rule.begin_step()
            for slot in own:
                if step >= 5:
                    module.late += 1 + dist.get_rank()
                    module.calls += 1
                rule.end_slot(slot)
            rule.end_step(real_slots=4, skipped=step == 6)
            values.append(float(module.late))
        return values, module.calls.tolist()
    finally:
        dist.destroy_process_group()


def test_ranks_agree_on_a_buffer_that_begins_to_change_later(pool: ProcessPool) -> None:
    (first, calls), (second, other_calls) = pool.run(late_values, 2, 9)
    assert first == [0, 0, 0, 0, 1, 1, 2, 4.5, 6]  # their own until the eighth step; the sixth is skipped
    assert second == [0, 0, 0, 0, 2, 2, 4, 4.5, 6]
    assert calls == other_calls == [4]


@pytest.mark.single
def test_what_was_infinite_becomes_a_number_and_a_skipped_step_changes_nothing() -> None:
    module: Any = nn.Module()
    module.register_buffer("least", torch.tensor([torch.inf, torch.nan, 1.0]))
    rule = BufferRule(module, RankReduction(range(2), world_size=1))
    for skipped, expected in ((True, [torch.inf, torch.nan, 1.0]), (False, [4.0, 4.0, 4.0])):
        rule.begin_step()
        for slot, value in enumerate((3.0, 5.0)):
            module.least.fill_(value)
            rule.end_slot(slot)
        rule.end_step(real_slots=2, skipped=skipped)
        torch.testing.assert_close(module.least, torch.tensor(expected), equal_nan=True, rtol=0, atol=0)


@pytest.mark.single
def test_large_whole_numbers_and_half_precision_are_not_rounded() -> None:
    module: Any = nn.Module()
    module.register_buffer("ids", torch.zeros(2, dtype=torch.int64))
    module.register_buffer("brief", torch.tensor([1.0], dtype=torch.bfloat16))
    rule = BufferRule(module, RankReduction(range(1), world_size=1))
    rule.begin_step()
    module.ids.fill_(2**40 + 1)
    module.brief.fill_(257.0 * 2**-15)
    expected = module.brief.clone()
    rule.end_slot(0)
    rule.end_step(real_slots=1, skipped=False)
    assert module.ids.tolist() == [2**40 + 1] * 2
    assert torch.equal(module.brief, expected)


@pytest.mark.single
def test_buffers_are_put_back_and_what_was_made_meanwhile_stays() -> None:
    module: Any = nn.Module()
    module.register_buffer("wide", torch.ones(1).expand(3))
    module.register_buffer("count", torch.zeros(()))
    held = module.count
    with preserved_buffers(module):
        module.count = module.count + 1
        module.wide = torch.zeros(3)
        module.register_buffer("made", torch.ones(1))
    assert module.count is held
    assert overlaps(module.wide)
    assert module.wide.tolist() == [1.0, 1.0, 1.0]
    assert module.made.item() == 1.0
