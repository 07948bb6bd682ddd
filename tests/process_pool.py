"""Gloo processes that live for the whole test run: importing torch and Accelerate in each test would take seconds."""

from __future__ import annotations

import multiprocessing as mp
import os
import socket
import traceback
import warnings
from collections.abc import Callable
from typing import Any

_SIZE = 4
_TIMEOUT_SECONDS = 120


class RemoteError(AssertionError):
    """A function raised in one of the processes; carries its traceback."""


class ProcessPool:
    """Runs a function in processes of one world; a new process group for each call."""

    def __init__(self) -> None:
        context = mp.get_context("spawn")
        self._workers = []
        for _ in range(_SIZE):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=False)
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def run(self, function: Callable[..., Any], world_size: int, *args: Any, **kwargs: Any) -> list[Any]:
        """Call the function in every process of a world and return what each rank returned."""
        port = _free_port()
        workers = self._workers[:world_size]
        for rank, (_, pipe) in enumerate(workers):
            pipe.send((function, args, kwargs, rank, world_size, port))
        replies = []
        for rank, (_, pipe) in enumerate(workers):
            if not pipe.poll(_TIMEOUT_SECONDS):
                raise RemoteError(f"rank {rank} of {world_size} did not answer within {_TIMEOUT_SECONDS} s")
            replies.append(pipe.recv())
        failures = [f"rank {rank}:\n{reply}" for rank, (ok, reply) in enumerate(replies) if not ok]
        if failures:
            raise RemoteError("\n".join(failures))
        return [reply for _, reply in replies]

    def close(self) -> None:
        """End the processes."""
        for process, pipe in self._workers:
            pipe.close()
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()
            process.close()


def _serve(pipe: Any) -> None:
    warnings.simplefilter("error")
    while True:
        try:
            function, args, kwargs, rank, world_size, port = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            os._exit(0)  # a gloo thread may abort an interpreter that shuts down in order
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world_size),
            LOCAL_WORLD_SIZE=str(world_size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            ACCELERATE_USE_CPU="true",
        )
        if world_size == 1:
            for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
                del os.environ[name]
        try:
            reply = (True, function(*args, **kwargs))
        except BaseException:
            reply = (False, traceback.format_exc())
        pipe.send(reply)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
