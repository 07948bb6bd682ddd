"""A run's first checkpoint proves itself: what a resumed run would lack is named, and what lacks nothing is left in peace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.observed import assert_bitwise_equal, configuration, observe
from tests.process_pool import ProcessPool

OFFENDERS = {
    "Counter": "calls (9 here, 1 after loading)",
    "Running": "mean (a tensor with other values)",
    "Generator": "noise (a Generator in another state)",
    "Held": "memory (calls: 9 here, 1 after loading)",
    "History": "history (9 entries here, 1 after loading)",
}
GOOD = ["CounterInBuffer", "Seen", "Hooked", "Unsaved", "Remembering", "Typed"]


def hidden(folder: Path, model: str, **changes: Any) -> dict[str, Any]:
    args = changes.pop("args", {})
    return configuration(
        folder,
        **{
            "model": {"target": f"tiny_hidden:{model}", "args": args},
            "data": {"train": {"target": "tiny:points", "args": {"size": 64, "dtype": "float32"}}},
            "batch": {"global_size": 16, "slots": 2},
            "optimizer": {"target": "AdamW", "args": {"lr": 0.01}},
            "checkpoint": {"every": "4 steps"},
            "limit": {"steps": 6},
            **changes,
        },
    )


def observe_messages(config: dict[str, Any], **options: Any) -> tuple[dict[str, Any], list[str]]:
    observed = observe(config, **options)
    records = [json.loads(line) for line in Path(config["output"], "metrics.jsonl").read_text().splitlines()]
    return observed, [record["text"] for record in records if record["event"] == "message"]


def about(told: list[str]) -> list[str]:
    return [text for text in told if "checkpoint" in text]


@pytest.mark.single
@pytest.mark.parametrize("model", OFFENDERS)
def test_state_beside_the_state_is_named(pool: ProcessPool, tmp_path: Path, model: str) -> None:
    _, told = pool.run(observe_messages, 1, hidden(tmp_path, model))[0]
    (warning,) = about(told)
    assert "a run resumed from a checkpoint would differ from this one" in warning
    assert f"model.{OFFENDERS[model]}" in warning
    assert ("one slot's loss is" in warning) == (model != "Counter")


@pytest.mark.single
@pytest.mark.parametrize("kind", ["numpy", "python"])
def test_generators_of_other_libraries_are_named(pool: ProcessPool, tmp_path: Path, kind: str) -> None:
    _, told = pool.run(observe_messages, 1, hidden(tmp_path, "Generator", args={"kind": kind}))[0]
    assert "model.noise (a" in about(told)[0]


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.single), 2])
@pytest.mark.parametrize("model", GOOD)
def test_models_that_keep_all_in_their_state_hear_nothing(
    pool: ProcessPool, tmp_path: Path, world_size: int, model: str
) -> None:
    if (model, world_size) == ("Remembering", 2):
        pytest.skip("what it counts is each rank's own, which is no run's state")
    for _, told in pool.run(observe_messages, world_size, hidden(tmp_path, model)):
        assert about(told) == []


@pytest.mark.single
@pytest.mark.parametrize(("optimizer", "named"), [("Warming", True), ("WarmingInState", False)])
def test_what_an_optimizer_keeps_beside_its_state_is_named(
    pool: ProcessPool, tmp_path: Path, optimizer: str, named: bool
) -> None:
    config = hidden(tmp_path, "CounterInBuffer", optimizer={"target": f"tiny_hidden:{optimizer}", "args": {"lr": 0.01}})
    _, told = pool.run(observe_messages, 1, config)[0]
    assert [text.count("Warming.steps (5 here, 1 after loading)") for text in about(told)] == [1] * named


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.single), 2])
@pytest.mark.parametrize("model", ["Seen", "Generator", "Running", "History", "Held", "Hooked", "Cached"])
def test_the_proof_leaves_no_trace(pool: ProcessPool, tmp_path: Path, world_size: int, model: str) -> None:
    args = {"Cached": {"how": "saved"}, "Hooked": {"counts": True}, "Generator": {"kind": "numpy"}}.get(model, {})
    more = {"args": args, "averaging": {"decay": 0.9}, "schedule": {"target": "StepLR", "args": {"step_size": 2}}}
    off, on = (
        pool.run(observe, world_size, hidden(tmp_path / checks, model, checks=checks, **more))[0]
        for checks in ("off", "on")
    )
    assert_bitwise_equal(off, on)
    assert off["losses"] == on["losses"]
    assert off["buffers"] == on["buffers"]


@pytest.mark.single
def test_what_cannot_be_tried_out_is_told_and_ends_nothing(pool: ProcessPool, tmp_path: Path) -> None:
    seen, told = pool.run(observe_messages, 1, hidden(tmp_path, "Uncopied"))[0]
    assert seen["outcome"] == "finished"
    assert [text.startswith("The first checkpoint was not verified (TypeError") for text in about(told)] == [True]


def observe_without_memory(config: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    from runtime.checks import copies

    free, copies._free_bytes = copies._free_bytes, lambda device: 100.0
    try:
        return observe_messages(config)
    finally:
        copies._free_bytes = free


@pytest.mark.single
def test_where_memory_has_no_room_that_is_told(pool: ProcessPool, tmp_path: Path) -> None:
    _, told = pool.run(observe_without_memory, 1, hidden(tmp_path, "Counter"))[0]
    assert about(told) == [
        "The first checkpoint was not verified (not enough memory for a second model and optimizer)."
    ]


def test_with_sharded_state_it_is_told_that_nothing_is_tried(pool: ProcessPool, tmp_path: Path) -> None:
    config = hidden(tmp_path, "Counter", strategy={"kind": "fsdp", "fsdp": {"min_parameters": 10}})
    _, told = pool.run(observe_messages, 2, config)[0]
    assert about(told) == [
        "The first checkpoint is not verified with strategy.kind: fsdp; to check it, start a run with ddp and without compile."
    ]


@pytest.mark.single
def test_a_run_whose_first_checkpoint_is_its_last_for_now_says_that_it_was_not_tried(
    pool: ProcessPool, tmp_path: Path
) -> None:
    _, told = pool.run(observe_stopped_messages, 1, hidden(tmp_path, "Counter"))[0]
    assert about(told) == ["The first checkpoint was not verified (the run is being stopped)."]


def observe_stopped_messages(config: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    from tests.test_resumption import observe_stopping

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.test_resumption.observe", observe_messages)
        observed: Any = observe_stopping(config, 2)  # returns what observe does
    return observed


@pytest.mark.single
def test_without_checks_and_on_resumption_nothing_is_tried(pool: ProcessPool, tmp_path: Path) -> None:
    for limit in (6, 12):
        _, told = pool.run(observe_messages, 1, hidden(tmp_path, "Counter", checks="off", limit={"steps": limit}))[0]
        assert about(told) == []
