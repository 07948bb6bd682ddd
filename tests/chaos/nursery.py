"""A process that has imported torch and Lockstep, and forks launchers like accelerate's, which fork ranks."""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from tests.chaos.processes import clean_environment, free_port
from tests.chaos.setting import LAUNCHER_PATIENCE_SECONDS, ROOT, TRAIN


class Nursery:
    """A process that has imported torch and Lockstep, and forks launchers like accelerate's, which fork ranks."""

    def __init__(self) -> None:
        line = [sys.executable, "-m", "tests.chaos.nursery"]
        self._process = subprocess.Popen(
            line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=clean_environment()
        )
        self.pid = self._process.pid
        self._answer()

    def start(self, config: Path, world_size: int, log: Path, **place: Any) -> int:
        """Return the process id of a launcher.

        Args:
            place: of this host among several: what else :func:`_launch` takes.
        """
        assert self._process.stdin is not None
        request = {"config": str(config), "world_size": world_size, "log": str(log), "port": free_port(), **place}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return int(self._answer())

    def close(self) -> None:
        """End it; it has no children of its own."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(20)
        self._process.stdout.close()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError("the nursery has died; its own message tells why")
        return answer


def nurse() -> int:
    """Serve as the nursery."""
    for module in (
        "accelerate",
        "torch.distributed",
        "torch._inductor",  # strict determinism imports it, which takes a second
        "runtime.build.builder",
        "runtime.launched",
        "runtime.run.run",
        "runtime.session",
        "runtime.strategies.ddp",
    ):
        importlib.import_module(module)
    gc.freeze()  # no garbage collection in a child touches, and so copies, what it shares with us
    print("ready", flush=True)
    for line in sys.stdin:
        reader, writer = os.pipe()
        between = os.fork()
        if between == 0:
            launcher = os.fork()
            if launcher == 0:
                os.close(reader)
                os.close(writer)
                _launch(**json.loads(line))
            os.write(writer, f"{launcher}\n".encode())
            os._exit(0)
        os.close(writer)
        os.waitpid(between, 0)  # its child is an orphan now, and the runner's
        print(os.read(reader, 100).decode().strip(), flush=True)
        os.close(reader)
    return 0


class _AskedError(Exception):
    pass


def _launch(
    *,
    config: str,
    world_size: int,
    log: str,
    port: int,
    address: str = "127.0.0.1",
    own: Sequence[int] | None = None,
    host: str | None = None,
) -> NoReturn:
    """Do what ``accelerate launch`` does: start ranks; when one fails or a signal comes, end the others.

    With one process accelerate passes no signal on and starts no session; with several each rank has a session of its own.

    Args:
        address: of the host of rank 0.
        own: the ranks on this host; by default all.
        host: a network namespace to be in, and this host's name.
    """
    os.setsid()
    if host is not None:
        _enter(host)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    ranks = []
    for rank in own or range(world_size):
        pid = os.fork()
        if pid == 0:
            _rank(config, rank, world_size, address, port)
        ranks.append(pid)
    if world_size == 1:
        os._exit(1 if os.waitpid(ranks[0], 0)[1] else 0)

    def asked(number: int, frame: object) -> None:
        raise _AskedError(number)

    failed, last_signal = False, signal.SIGTERM
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, asked)
        while ranks and not failed:
            time.sleep(0.05)
            failed = _reap(ranks)
    except _AskedError as error:
        failed, last_signal = True, error.args[0]
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    _end(ranks, last_signal)
    os._exit(1 if failed else 0)


def _reap(ranks: list[int]) -> bool:
    """Forget the ranks that have ended; tell whether one has failed."""
    failed = False
    for pid in ranks.copy():
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            ranks.remove(pid)
            failed |= status != 0
    return failed


def _end(ranks: list[int], number: int) -> None:
    for pid in ranks:
        with suppress(ProcessLookupError):
            os.killpg(pid, number)
    deadline = time.monotonic() + LAUNCHER_PATIENCE_SECONDS
    while ranks and time.monotonic() < deadline:
        time.sleep(0.02)
        _reap(ranks)
    for pid in ranks:
        print(f"launcher: rank process {pid} had to be killed", file=sys.stderr, flush=True)
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


def _enter(host: str) -> None:
    """Be on a host of one's own: its network, and its name."""
    libc = ctypes.CDLL(None, use_errno=True)
    clone_newuts, clone_newnet = 0x04000000, 0x40000000
    with Path("/run/netns", host).open() as namespace:
        done = libc.setns(namespace.fileno(), clone_newnet) == 0 and libc.unshare(clone_newuts) == 0
    if not done:
        raise OSError(ctypes.get_errno(), f"{host} cannot be entered")
    socket.sethostname(host)
    os.environ["GLOO_SOCKET_IFNAME"] = "eth0"


def _rank(config: str, rank: int, world_size: int, address: str, port: int) -> NoReturn:
    """Be one rank: what ``runtime/train.py`` does in a process that has just been started."""
    import torch

    import runtime.launched

    os.environ.update(LOCKSTEP_WORLD_SIZE=str(world_size), ACCELERATE_USE_CPU="true")
    if world_size > 1:
        os.setsid()
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world_size),
            LOCAL_WORLD_SIZE=str(world_size),
            MASTER_ADDR=address,
            MASTER_PORT=str(port),
        )
    sys.argv = [str(TRAIN), config]
    random.seed()  # a new process has random numbers of its own
    np.random.seed()
    torch.seed()
    code = 1
    try:
        code = runtime.launched.run("train", [config])
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(code)  # taking torch's modules apart would take 1.5 s; true launches do


if __name__ == "__main__":
    sys.exit(nurse())
