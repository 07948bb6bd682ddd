"""Gloo processes that live for the whole test run: importing torch and Accelerate in each test would take seconds."""

from __future__ import annotations

import gc
import multiprocessing as mp
import os
import socket
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any

_TIMEOUT_SECONDS = 600  # on a machine whose cores are shared
_PATIENCE_SECONDS = 20
_SILENT = "did not answer"


class RemoteError(AssertionError):
    """A function raised in one of the processes; carries its traceback."""


class ProcessPool:
    """Runs a function in processes of one world; a new process group for each call.

    Attributes:
        most: world size that is not to be exceeded, if any.
    """

    def __init__(self) -> None:
        self.most: int | None = None
        self._workers: list[tuple[Any, Any]] = []

    def _grow(self, size: int) -> None:
        """Start what is missing; a run of single-process tests needs one process only."""
        context = mp.get_context("spawn")
        while len(self._workers) < size:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=False)
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def run(self, function: Callable[..., Any], world_size: int, *args: Any, **kwargs: Any) -> list[Any]:
        """Call the function in every process of a world and return what each rank returned."""
        assert self.most is None or world_size <= self.most, "what is marked 'single' makes no process group"
        self._grow(world_size)
        port = _free_port()
        workers = self._workers[:world_size]
        for rank, (_, pipe) in enumerate(workers):
            pipe.send((function, args, kwargs, rank, world_size, port))
        replies = self._replies([pipe for _, pipe in workers])
        failures = [f"rank {rank}:\n{reply}" for rank, (ok, reply) in enumerate(replies) if not ok]
        if failures:
            if any(reply is _SILENT for _, reply in replies):
                self._replace()
            raise RemoteError("\n".join(failures))
        return [reply for _, reply in replies]

    def _replies(self, pipes: list[Any]) -> list[tuple[bool, Any]]:
        """Wait for all; once one has failed, the others (which may wait for it for ever) get little time."""
        replies: dict[int, tuple[bool, Any]] = {}
        patience: float = _TIMEOUT_SECONDS
        while len(replies) < len(pipes):
            ready = wait([pipe for rank, pipe in enumerate(pipes) if rank not in replies], patience)
            if not ready:
                break
            replies |= {rank: pipe.recv() for rank, pipe in enumerate(pipes) if pipe in ready}
            if any(not ok for ok, _ in replies.values()):
                patience = _PATIENCE_SECONDS
        return [replies.get(rank, (False, _SILENT)) for rank in range(len(pipes))]

    def _replace(self) -> None:
        for process, _ in self._workers:
            process.kill()
        self.close()
        self._workers = []

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
    mp.set_start_method(
        "fork", force=True
    )  # as in a rank that a launcher starts: its loader workers need not import torch
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
            LOCKSTEP_WATCH="off",  # a worker serves on after a rank has failed
        )
        if world_size == 1:
            for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
                del os.environ[name]
        try:
            reply = (True, function(*args, **kwargs))
        except BaseException:
            reply = (False, traceback.format_exc())
        pipe.send(reply)
        gc.freeze()  # what has been imported need not be searched for garbage after every run


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
