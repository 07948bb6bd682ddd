"""The same processes train, evaluate and predict one after the other, each time as a process group of their own."""

from __future__ import annotations

import importlib.util
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public all the same

from tests.observed import configuration
from tests.process_pool import ProcessPool

NEEDS_DEEPSPEED = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs the extra deepspeed")


def run(folder: Path, kind: str) -> dict[str, Any]:
    """Its ranks wait for one another for seconds, not for half an hour."""
    points = {"target": "tiny:points", "args": {"dtype": "float32"}}
    return configuration(
        folder,
        model={"target": "tiny:Mlp", "args": {"dtype": "float32"}},
        data={"train": points, "test": points},
        strategy={"kind": kind},
        limit={"steps": 3, "stall_seconds": 30},
    )


def act_after_act(config: dict[str, Any], output: str, agent_port: int | None) -> tuple[list[Any], list[bool]]:
    """Train, evaluate and predict; return what came of it, and whether each was watched over until its end."""
    from runtime.distributed.watchdog import Watchdog
    from runtime.session import evaluate, predict, train

    watched: list[bool] = []
    stop = Watchdog.stop

    def noted(self: Any) -> None:
        watched.append(not self._over.is_set())
        stop(self)

    told = {"LOCKSTEP_WATCH": "on"}
    if agent_port is not None:  # as torchrun and accelerate launch do
        told |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_PORT": str(agent_port)}
    before = dict(os.environ)
    if agent_port is None:
        os.environ.pop("LOCAL_WORLD_SIZE", None)  # hand-written launchers may not set it; launch agents do
    os.environ.update(told)
    Watchdog.stop = noted  # type: ignore[method-assign]
    try:
        trained = train(config)
        evaluated = evaluate(config, split="test")
        predict(config, output=output)
        return [trained.step, evaluated.results["samples"], evaluate(config, split="test").results], watched
    finally:
        Watchdog.stop = stop  # type: ignore[method-assign]
        os.environ.clear()
        os.environ.update(before)


@pytest.mark.parametrize(
    ("kind", "hosted_by"),
    [
        ("ddp", "rank 0"),
        ("ddp", "the launch agent"),
        pytest.param("fsdp", "rank 0", marks=pytest.mark.long),
        pytest.param("fsdp", "the launch agent", marks=pytest.mark.long),
        pytest.param("zero", "rank 0", marks=NEEDS_DEEPSPEED),
        pytest.param("zero", "the launch agent", marks=[NEEDS_DEEPSPEED, pytest.mark.long]),
    ],
)
def test_acts_follow_one_another_in_the_same_processes(
    pool: ProcessPool, tmp_path: Path, kind: str, hosted_by: str
) -> None:
    agent = None
    if hosted_by == "the launch agent":
        agent = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30))
    port = agent.port if agent is not None else None
    first, second = pool.run(act_after_act, 2, run(tmp_path, kind), str(tmp_path / "rows.csv"), port)
    assert first == second
    assert first[0][:2] == [3, 96.0]
    assert first[1] == [True] * 4
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 97
