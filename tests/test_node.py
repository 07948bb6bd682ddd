"""One machine of several without a launch agent: signals arrive, and every machine ends with the run's outcome."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.node import _environment, _parser, exit_code
from tests.chaos.processes import free_port
from tests.test_failure import endless
from tests.test_launch import clean_environment, written

_TIMEOUT_SECONDS = 300


def line(config: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "launch.node", str(config), *arguments]


class Node:
    """One machine's starter, whose words are collected; ``trained`` is set when it has reported a step."""

    def __init__(self, command: list[str]) -> None:
        self.process = subprocess.Popen(
            command,
            env=clean_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.said: list[str] = []
        self.trained = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for text in lines:
                self.said.append(text)
                if text.startswith("epoch "):
                    self.trained.set()
        self.trained.set()  # nobody waits for what will not come

    def code(self) -> int:
        code = self.process.wait(_TIMEOUT_SECONDS)
        self._reader.join(_TIMEOUT_SECONDS)
        return code


@contextmanager
def machines(config: Path, *arguments: str, number: int = 2) -> Iterator[list[Node]]:
    """Start machines that meet on this one; whatever is left of them is ended."""
    common = [*arguments, "--nodes", str(number), "--main-port", str(free_port())]
    nodes = [Node(line(config, *common, "--node-rank", str(rank))) for rank in range(number)]
    try:
        yield nodes
    finally:
        for node in nodes:
            if node.process.poll() is None:
                os.killpg(node.process.pid, signal.SIGKILL)
            node.code()


def saved(folder: Path, config: dict[str, Any]) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def outcome(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run" / "outcome.json").read_text())


def test_when_one_machine_is_asked_to_stop_all_save_and_end_alike_and_go_on_to_the_end(tmp_path: Path) -> None:
    path = saved(tmp_path, endless(tmp_path))
    with machines(path) as (first, second):
        assert first.trained.wait(_TIMEOUT_SECONDS), first.said
        second.process.send_signal(signal.SIGTERM)
        assert [first.code(), second.code()] == [75, 75], (first.said, second.said)
    stopped = outcome(tmp_path)
    assert stopped["outcome"] == "stopped"
    saves = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.startswith("step-"))
    assert saves[-1].startswith(f"step-{stopped['step']:08}")

    with machines(path, f"limit.steps={stopped['step'] + 3}") as (first, second):
        assert [first.code(), second.code()] == [0, 0], (first.said, second.said)
    assert outcome(tmp_path)["step"] == stopped["step"] + 3


@pytest.mark.long
def test_a_signal_that_comes_before_python_has_started_is_not_lost(tmp_path: Path) -> None:
    node = Node(line(saved(tmp_path, endless(tmp_path))))
    while not children(node.process.pid) and node.process.poll() is None:
        os.sched_yield()
    node.process.send_signal(signal.SIGTERM)
    assert node.code() == 75, node.said
    assert outcome(tmp_path)["outcome"] == "stopped"


def children(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []


def test_a_machine_that_waits_for_the_others_leaves_when_it_is_asked_to(tmp_path: Path) -> None:
    node = Node([*line(written(tmp_path), "--nodes", "2", "--main-port", str(port := free_port()))])
    while not listens(port) and node.process.poll() is None:
        os.sched_yield()
    node.process.send_signal(signal.SIGTERM)
    assert node.code() == 75, node.said
    assert not (tmp_path / "run").exists()


def listens(port: int) -> bool:
    """Tell whether somebody listens at a port; nobody is connected to, which would be an answer."""
    lines = [
        text.split() for name in ("tcp", "tcp6") for text in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
    ]
    return any(int(words[1].rpartition(":")[2], 16) == port and words[3] == "0A" for words in lines)


# Waiting for processes, without training in them

WAITS = """
import signal, subprocess, sys
from launch import node

signal.pthread_sigmask(signal.SIG_BLOCK, node._WATCHED)
line = [sys.executable, "-S", "-c"]
processes = [subprocess.Popen([*line, code], preexec_fn=node._unblock_signals) for code in sys.argv[2:]]
print(node._wait(processes, float(sys.argv[1])), flush=True)
"""
FAILS = "raise SystemExit(3)"
ENDS = "raise SystemExit(0)"
STAYS = "import signal; print('ready', flush=True); signal.pause()"
LEAVES_LATER = "import time; time.sleep(2)"
HEARS_THE_SECOND = """
import signal

heard = []
signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
print("ready", flush=True)
while len(heard) < 2:
    signal.pause()
raise SystemExit(75)
"""


@contextmanager
def waiting(patience_seconds: float, *codes: str) -> Iterator[subprocess.Popen[str]]:
    """A process that waits for some as for ranks; whatever is left of it is ended."""
    line = [sys.executable, "-c", WAITS, str(patience_seconds), *codes]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True, env=clean_environment(), start_new_session=True)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=_TIMEOUT_SECONDS)


@pytest.mark.parametrize("wish", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_wish_reaches_the_processes_until_they_have_heeded_it(wish: signal.Signals) -> None:
    """Once is not enough: to a process that is only starting it says nothing."""
    with waiting(1000, HEARS_THE_SECOND) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(wish)
        assert process.communicate(timeout=_TIMEOUT_SECONDS)[0] == "[75]\n"


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ((FAILS, STAYS), "[3, -9]"),  # it never met the other, and would wait for it
        ((ENDS, LEAVES_LATER), "[0, 0]"),  # which may still be saving
    ],
)
def test_processes_that_stay_are_ended_only_after_one_has_failed(codes: tuple[str, str], expected: str) -> None:
    with waiting(0.5, *codes) as process:
        assert process.communicate(timeout=_TIMEOUT_SECONDS)[0].splitlines()[-1] == expected


def test_processes_are_told_their_ranks_and_one_alone_is_not() -> None:
    options = _parser().parse_args(
        ["x.yaml", "--nodes=3", "--node-rank=1", "--processes=2", "--main-address=h", "--main-port=7"]
    )
    told = _environment(options, 1, "token")
    ranks = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "2"}
    assert told.items() >= {**ranks, "MASTER_ADDR": "h", "MASTER_PORT": "7", "LOCKSTEP_WORLD_SIZE": "6"}.items()
    assert (told["LOCKSTEP_LAUNCH"], told["ACCELERATE_USE_CPU"]) == ("token", "true")
    assert "ACCELERATE_USE_CPU" not in _environment(_parser().parse_args(["x.yaml", "--gpus"]), 0, "token")
    alone = _environment(_parser().parse_args(["x.yaml"]), 0, "token")
    assert {*alone} == {
        *("LOCKSTEP_WORLD_SIZE", "LOCKSTEP_LAUNCH", "LOCKSTEP_LAUNCHER", "OMP_NUM_THREADS", "ACCELERATE_USE_CPU")
    }


@pytest.mark.long
def test_a_failure_that_would_repeat_ends_with_the_code_of_a_mistake(tmp_path: Path) -> None:
    path = written(tmp_path, objective="tiny_losses:Infinite")
    done = subprocess.run(line(path), env=clean_environment(), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2
    assert "gradient is NaN or infinite" in done.stderr
    assert outcome(tmp_path)["exit_code"] == 1


@pytest.mark.long
def test_when_a_rank_is_killed_all_machines_end_with_a_failure_that_may_be_got_past(tmp_path: Path) -> None:
    path = saved(tmp_path, endless(tmp_path))
    with machines(path, "--processes", "2") as (first, second):
        assert first.trained.wait(_TIMEOUT_SECONDS), first.said
        os.kill(int(children(second.process.pid)[1]), signal.SIGKILL)
        assert [first.code(), second.code()] == [1, 1], (first.said, second.said)
    assert any("rank 3" in text for text in first.said)


@pytest.mark.parametrize(
    ("arguments", "code", "what"),
    [
        (["limit.step=3"], 2, "limit.step: "),
        (["--nodes", "2", "--node-rank", "2"], 2, "--node-rank is 2; with 2 machines it must be 0 to 1"),
        (["--gpus", "--processes", "2"], 1, "2 GPUs were requested, but torch can use 0 on this machine"),
    ],
)
def test_what_can_be_told_at_once_is_told_before_a_process_is_started(
    tmp_path: Path, arguments: list[str], code: int, what: str
) -> None:
    command = line(written(tmp_path), *arguments)
    done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == code
    assert what in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("left", "codes", "expected"),
    [
        ({"exit_code": 0}, [0, 0], 0),
        ({"exit_code": 0}, [0, -6], 0),  # gloo may abort a process that has finished
        ({"exit_code": 75}, [0, 0], 75),
        ({"exit_code": 1, "repeats": False}, [1, 1], 1),
        ({"exit_code": 1, "repeats": True}, [1, 1], 2),
        ({"exit_code": 2, "repeats": True}, [2, 2], 2),
        (None, [2, 0], 2),
        (None, [-9, 1], 1),
        (None, [0, 0], 1),  # a run always leaves word
    ],
)
def test_the_outcome_decides_and_where_there_is_none_the_exit_codes(
    left: dict[str, Any] | None, codes: list[int], expected: int
) -> None:
    assert exit_code(left, codes) == expected
