"""Processes whose launcher is killed save and leave; terminals that close are a wish to stop; stores listen where they must."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from runtime.distributed.launcher_watch import _is_launcher, launcher_ended
from tests.chaos.processes import processes
from tests.observed import configuration
from tests.test_launch import ACCELERATE, clean_environment

ROOT = Path(__file__).parent.parent
TRAIN = str(ROOT / "runtime" / "train.py")
LAUNCHERS = {
    "lockstep train": [sys.executable, "-m", "runtime.cli", "train", "CONFIG", "--processes", "2"],
    "the node launcher": [sys.executable, "-m", "launch.node", "CONFIG", "--processes", "2"],
    "accelerate launch": [*ACCELERATE, "--cpu", "--num_processes", "1", "--num_machines", "1", TRAIN, "CONFIG"],
}


def wait(condition: Callable[[], object], process: subprocess.Popen[bytes] | None = None) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        assert process is None or process.poll() is None
        time.sleep(0.05)


def descendants(pid: int) -> set[int]:
    found, everyone = {pid}, processes().values()
    while more := {p.pid for p in everyone if p.parent in found and p.state not in "ZX"} - found:
        found |= more
    return found - {pid}


def alive(pids: set[int]) -> set[int]:
    return {p.pid for p in processes().values() if p.pid in pids and p.state not in "ZX"}


@contextmanager
def launched(folder: Path, line: list[str], port: int | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """Start an endless run and wait for its first report."""
    config = configuration(folder / "run", limit={"steps": 10**7})
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    words = [str(folder / "run.yaml") if word == "CONFIG" else word for word in line]
    words += ["--main-port", str(port)] if port is not None else []
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log, env=clean_environment(ACCELERATE_USE_CPU="true"))
    everyone: set[int] = set()
    try:
        records = folder / "run" / "metrics.jsonl"
        wait(lambda: records.exists() and '"step": 2,' in records.read_text(), process)
        everyone = descendants(process.pid)
        yield process
    finally:
        for pid in [process.pid, *alive(everyone)]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def outcome(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "run" / "outcome.json").read_text()))


def listeners(pids: set[int]) -> set[str]:
    """Return the addresses, in hexadecimal, that processes listen at."""
    listening = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A":
                listening[words[9]] = words[1].partition(":")[0]
    found = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                inode = str(descriptor.readlink()).removeprefix("socket:[").removesuffix("]")
                found |= {listening[inode]} if inode in listening else set()
    return found


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_when_the_launcher_is_killed_the_processes_save_and_leave(
    tmp_path: Path, launcher: str, free_port: int
) -> None:
    port = free_port if "node" in launcher else None
    with launched(tmp_path, LAUNCHERS[launcher], port) as process:
        everyone = descendants(process.pid)
        assert listeners(everyone | {process.pid}) <= {"0100007F"}, "others than loopback are open to anybody"
        process.kill()
        process.wait()
        wait(lambda: not alive(everyone))
    assert outcome(tmp_path)["outcome"] == "stopped", (tmp_path / "log.txt").read_text()
    assert outcome(tmp_path)["reason"] in ("the end of the launcher", None)
    assert [*(tmp_path / "run" / "checkpoints").glob("step-*")]


@pytest.fixture
def free_port() -> int:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@pytest.fixture
def own_terminal() -> Iterator[None]:
    """What is started does not inherit that these tests themselves were started by nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("own_terminal")
@pytest.mark.parametrize("nohup", [False, True])
def test_a_terminal_that_closes_is_a_wish_to_stop_unless_nohup_says_otherwise(tmp_path: Path, nohup: bool) -> None:
    line = [*(["nohup"] if nohup else []), sys.executable, TRAIN, "CONFIG"]
    with launched(tmp_path, line) as process:
        process.send_signal(signal.SIGHUP)
        if nohup:
            process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert outcome(tmp_path)["outcome"] == "stopped"
    assert outcome(tmp_path)["reason"] == ("SIGTERM" if nohup else "SIGHUP")


@pytest.mark.parametrize(
    ("line", "is_launcher"),
    [
        ("/v/bin/python /v/bin/accelerate launch --cpu run.py", True),
        ("python /w/launch/agent.py -m accelerate.commands.launch run.py", True),
        ("python -u -X dev -m torch.distributed.run run.py", True),
        ("python3.12 /v/lib/torch/distributed/launch.py run.py", True),
        ("python -W error /v/bin/torchrun run.py", True),
        ("python -u -m deepspeed.launcher.launch --world_info=x run.py", True),
        ("/usr/bin/mpirun -n 2 python run.py", True),
        ("/usr/bin/hydra_pmi_proxy --control-port h:1", True),
        ("bash /home/me/accelerate/run.sh torchrun", False),
        ("bash /home/me/torchrun.sh", False),
        ("python -m pytest tests/accelerate/torch/distributed", False),
        ("python /home/torch.distributed/run_all.py torchrun", False),
        ("make -C accelerate", False),
        ("tmux new -s deepspeed", False),
        ("", False),
    ],
)
def test_a_launcher_is_known_by_its_command_line(line: str, is_launcher: bool) -> None:
    assert _is_launcher(line.split(" ")) == is_launcher


def test_a_launcher_of_a_launcher_is_watched_too(tmp_path: Path) -> None:
    """As with ``deepspeed``, whose second process starts the ranks, and lives on when the first is killed."""
    rank = (
        f"{sys.executable} -c 'from runtime.distributed.launcher_watch import _launching_ancestors as a; print(*a())'"
    )
    for name, line in (("torchrun", f"{sys.executable} {tmp_path}/deepspeed"), ("deepspeed", rank)):
        (tmp_path / name).write_text(f"import os\nprint(os.getpid(), flush=True)\nos.system({'exec ' + line!r})\n")
    done = subprocess.run(
        [sys.executable, str(tmp_path / "torchrun")], capture_output=True, text=True, check=True, cwd=ROOT
    )
    first, second, ancestors = done.stdout.splitlines()
    assert ancestors.split() == [second, first]


def test_this_process_has_no_launcher_that_has_ended() -> None:
    assert not launcher_ended()()


def test_processes_that_wait_for_one_that_was_killed_leave_soon_when_they_are_asked_to(
    tmp_path: Path, free_port: int
) -> None:
    """Before the first step there is nothing to save; a launch agent would wait 30 s, and then kill."""
    config = configuration(tmp_path / "run")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port), "ACCELERATE_USE_CPU": "true"}
    process = subprocess.Popen(
        [sys.executable, TRAIN, str(tmp_path / "run.yaml")],
        env=clean_environment(**variables, **meeting, LOCKSTEP_OUTCOME=str(tmp_path / "outcome.json")),
        stderr=subprocess.PIPE,
        text=True,
    )
    wait(lambda: "0100007F" in listeners({process.pid}))
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=25)
    assert "asked to stop (SIGTERM) before the first step" in said
    assert "Traceback" not in said
    assert json.loads((tmp_path / "outcome.json").read_text())["exit_code"] == 75
