"""One start of the run: a launcher and its ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from tests.chaos.nursery import Nursery
from tests.chaos.processes import Process, clean_environment, descendants, free_port, processes
from tests.chaos.setting import TRAIN


class Start:
    """One start of the run: a launcher and its ranks.

    Args:
        how: ``fork``, ``lockstep`` or ``accelerate``.
    """

    def __init__(self, how: str, world_size: int, config: Path, log: Path, nursery: Nursery) -> None:
        self.how, self.world_size, self.log = how, world_size, log
        self.began = time.time()
        self._nursery = nursery
        self._popen: subprocess.Popen[bytes] | None = None
        self._pidfd = -1
        self.code: int | None = None
        if how == "fork":
            self.launcher = nursery.start(config, world_size, log)
        else:
            self._popen = self._really(config)
            self.launcher = self._popen.pid

    def _really(self, config: Path) -> subprocess.Popen[bytes]:
        if self.how == "lockstep":
            line = [sys.executable, "-m", "runtime.cli", "train", str(config), "--processes", str(self.world_size)]
            added = {}
        else:
            several = ["--multi_gpu", "--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port())]
            line = [
                sys.executable, "-m", "accelerate.commands.launch", *(several if self.world_size > 1 else ["--cpu"]),
                "--num_processes", str(self.world_size), "--num_machines", "1", "--mixed_precision", "no",
                "--dynamo_backend", "no", str(TRAIN), str(config),
            ]  # fmt: skip
            added = {"ACCELERATE_USE_CPU": "true"}
        with self.log.open("ab") as out:
            return subprocess.Popen(
                line,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
                env=clean_environment(**added),
            )

    def alive(self) -> list[Process]:
        """Return all its processes: we are the parent of those whose parent has died."""
        everything = processes()  # 4 ms
        self._reap(everything)
        return descendants(everything, os.getpid(), without=self._nursery.pid)

    def ranks(self) -> list[int]:
        """Return the process ids of its ranks, in order as far as that can be seen."""
        alive = self.alive()
        if self.how == "fork":
            return [p.pid for p in alive if p.parent == self.launcher]
        trains = {p.pid: p.parent for p in alive if _is_rank(p.pid)}
        return sorted(pid for pid, parent in trains.items() if parent not in trains)

    def wait(self, seconds: float) -> bool:
        """Wait until all processes have gone; return whether they have."""
        deadline = time.monotonic() + seconds
        while self.alive():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.03)
        self._reap(processes())  # what was a zombie by then
        return True

    def abort(self) -> None:
        """End processes that hang, with their stacks in the log."""
        for number in (signal.SIGABRT, signal.SIGKILL):
            for process in self.alive():
                with suppress(ProcessLookupError):
                    os.kill(process.pid, number)
            self.wait(3.0)

    def _reap(self, everything: dict[int, Process]) -> None:
        if self._popen is not None and self._popen.poll() is not None:
            self.code = self._popen.returncode
        for process in everything.values():
            if process.parent == os.getpid() and process.state == "Z" and process.pid != self._nursery.pid:
                with suppress(ChildProcessError):
                    status = os.waitpid(process.pid, os.WNOHANG)[1]
                    if process.pid == self.launcher:
                        self.code = os.waitstatus_to_exitcode(status)


def _is_rank(pid: int) -> bool:
    with suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        return str(TRAIN).encode() in words and b"accelerate.commands.launch" not in words
    return False
