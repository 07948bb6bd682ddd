"""Real runs sharded by ZeRO of which a rank is killed in the middle of an epoch: the same command again goes on bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("deepspeed", reason="needs the extra deepspeed")

from tests.chaos.nursery import Nursery
from tests.forked import Forked
from tests.observed import observe
from tests.process_pool import ProcessPool
from tests.test_failure import ranks
from tests.test_launch import clean_environment
from tests.test_zero import ROOT, differences, gpt, zero

STEPS = 24
_WITHIN_SECONDS = 240
LOCKSTEP = [sys.executable, "-m", "runtime.cli", "train"]
ACCELERATE = [
    sys.executable,
    "-m",
    "accelerate.commands.launch",
    "--config_file",
    str(ROOT / "launch" / "templates" / "accelerate_zero.yaml"),
    "--num_processes",
    "2",
    str(ROOT / "runtime" / "train.py"),
]


def run(folder: Path, stage: int, precision: str = "fp32") -> dict[str, Any]:
    """Dropout, an average, a warm-up, three slots a rank; an epoch is of 100 steps, so that the run ends in its first.

    After the twelfth step each rank waits while there is a file ``hold``, so that none has ended when it is to be killed.
    """
    hold = {"target": "tiny_observers:Hold", "args": {"file": str(folder / "hold"), "step": 12}}
    return gpt(
        folder / "run",
        data={"train": {"target": "tiny:tokens", "args": {"size": 1300}}},
        strategy=zero(stage),
        precision=precision,
        averaging={"decay": 0.9},
        limit={"steps": STEPS},
        checkpoint={"every": "3 steps"},
        reporting={"every": "1 step", "progress": False, "observers": [hold]},
    )


def saved_steps(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (folder / "run" / "checkpoints").glob("step-????????"))


def assert_it_went_on_bit_for_bit(pool: ProcessPool, folder: Path, config: dict[str, Any]) -> None:
    whole = folder.with_name("whole")
    pool.run(observe, 2, {**config, "output": str(whole / "run")})
    assert saved_steps(folder)[-1] == STEPS
    assert set(differences(whole / "run", folder / "run").values()) == {0.0}


def test_a_run_of_which_a_rank_is_killed_goes_on_bit_for_bit(
    pool: ProcessPool, nursery: Nursery, tmp_path: Path
) -> None:
    folder = tmp_path / "killed"
    folder.mkdir()
    config = run(folder, 1)
    (folder / "hold").touch()
    with Forked(nursery, folder, config, 2) as launch:
        launch.wait(lambda: len(saved_steps(folder)) > 1)
        os.kill(launch.ranks()[1], signal.SIGKILL)
        launch.wait_for_end()
    (folder / "hold").unlink()
    assert 6 <= saved_steps(folder)[-1] <= 12
    with Forked(nursery, folder, config, 2) as launch:
        launch.wait_for_end()
        assert launch.outcome()["outcome"] == "finished", launch.told()
    assert_it_went_on_bit_for_bit(pool, folder, config)


@pytest.mark.long
@pytest.mark.parametrize(
    ("stage", "rank", "precision", "command"),
    [(1, 1, "fp32", LOCKSTEP), (2, 0, "fp32", ACCELERATE), (3, 1, "fp32", LOCKSTEP), (3, 0, "bf16", LOCKSTEP)],
)
def test_the_same_command_again_goes_on_after_a_kill(
    pool: ProcessPool, tmp_path: Path, stage: int, rank: int, precision: str, command: list[str]
) -> None:
    folder = tmp_path / "killed"
    folder.mkdir()
    path = folder / "config.yaml"
    config = run(folder, stage, precision)
    path.write_text(yaml.safe_dump(config))
    line = [*command, str(path), *(["--processes", "2"] if command is LOCKSTEP else [])]
    told: dict[str, Any] = {
        "env": clean_environment(),
        "cwd": ROOT,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
    }
    (folder / "hold").touch()
    launcher = subprocess.Popen(line, **told)
    try:
        kill_a_rank(launcher, folder, rank)
        launcher.communicate(timeout=_WITHIN_SECONDS)
    finally:
        for process in [*ranks(folder).values(), launcher.pid]:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        launcher.communicate()
    assert launcher.returncode == 1
    (folder / "hold").unlink()
    assert 6 <= saved_steps(folder)[-1] <= 12
    again = subprocess.run(line, **told, timeout=_WITHIN_SECONDS, check=False)
    assert again.returncode == 0, again.stdout.decode()
    assert_it_went_on_bit_for_bit(pool, folder, config)


def kill_a_rank(launcher: subprocess.Popen[bytes], folder: Path, rank: int) -> None:
    """Kill a rank once it has saved twice; none of its own handlers can run."""
    until = time.monotonic() + _WITHIN_SECONDS
    while len(saved_steps(folder)) < 2:
        assert launcher.poll() is None, launcher.communicate()
        assert time.monotonic() < until
        time.sleep(0.01)
    os.kill(ranks(folder)[rank], signal.SIGKILL)
