"""Collectives, and decisions that all ranks take together.

Decisions between steps use one small asynchronous all-reduce, started before a step's forward passes and read at its end,
when it has long completed, so that all ranks stop after the same step.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from runtime.errors import (
    CheckpointError,
    ConfigurationError,
    DivergenceError,
    LockstepError,
    PredictionError,
    Problem,
    RanksDifferError,
    RunFolderError,
)
from runtime.exact_sum import exact_sums

_SECONDS_BETWEEN = 0.25  # longest delay of a stop request; at this interval the all-reduce costs next to nothing
_MOST_STEPS_BETWEEN = 64
_SECONDS_AHEAD = 0.05  # in steps of half this length, waiting for a sum costs less than 1 %
_MOST_STEPS_AHEAD = 8
_SHORT = 1024  # bytes that travel as fast as a single number
_LENGTH = 8


class StopConsensus:
    """Agreement on stop requests, effective on all ranks after the same step; also compares the samples drawn so far.

    Collective: every rank must call ``begin`` and ``end`` around every step. A message of 32 bytes is sent every n steps; n
    follows from the slowest rank's step time, which is part of the message, so it is equal on all ranks.

    Args:
        world_size: number of processes; with one, nothing is sent.
        device: device of the message; of the kind that the process group uses.
        drawn: returns a digest below 2**53 of the samples drawn until the step that begins.
    """

    def __init__(self, *, world_size: int, device: torch.device, drawn: Callable[[], int] = lambda: 0) -> None:
        self._world_size = world_size
        self._drawn = drawn
        self._message = torch.zeros(4, dtype=torch.float64, device=device)
        self._steps = 0
        self._due = 0
        self._since = (time.monotonic(), 0)
        self._requested = False
        self._seconds_per_step: float | None = None  # of the slowest rank; equal on all ranks
        self._pending: Any = None

    def begin(self, stop_requested: bool) -> None:
        """Start the all-reduce, if a message is due before this step."""
        self._requested = stop_requested
        if self._world_size == 1 or self._steps < self._due:
            return
        now, (then, steps_then) = time.monotonic(), self._since
        seconds_per_step = (now - then) / max(1, self._steps - steps_then)
        self._since = (now, self._steps)
        drawn = float(self._drawn())  # max(x) == -max(-x) only if all are equal
        self._message.copy_(torch.tensor([float(stop_requested), seconds_per_step, drawn, -drawn], dtype=torch.float64))
        self._pending = dist.all_reduce(self._message, op=dist.ReduceOp.MAX, async_op=True)

    def end(self) -> bool:
        """Return whether any rank has a stop request; the same answer on every rank.

        Raises:
            RanksDifferError: the ranks have drawn different samples; raised on every rank.
        """
        self._steps += 1
        if self._world_size == 1:
            return self._requested
        if self._pending is None:
            return False
        self._pending.wait()
        self._pending = None
        # Synchronizes with the device, but the message was started a step ago.
        requested, seconds_per_step, largest, smallest = self._message.tolist()
        _check_drawn(largest, -smallest)
        self._seconds_per_step = seconds_per_step
        between = int(_SECONDS_BETWEEN / max(seconds_per_step, 1e-6))
        self._due = self._steps + max(1, min(_MOST_STEPS_BETWEEN, between)) - 1
        return bool(requested)

    @property
    def steps_ahead(self) -> int:
        """Number of steps whose sums should be computed ahead in one all-reduce; equal on all ranks between two steps."""
        if self._world_size == 1 or self._seconds_per_step is None:
            return 1
        return max(1, min(_MOST_STEPS_AHEAD, int(_SECONDS_AHEAD / max(self._seconds_per_step, 1e-6))))

    def check_drawn(self) -> None:
        """Compare the samples drawn, without delay. Collective: every rank must call this between two steps.

        Raises:
            RanksDifferError: the ranks have drawn different samples; raised on every rank.
        """
        if self._world_size > 1:
            drawn = float(self._drawn())
            self._message.copy_(torch.tensor([0.0, 0.0, drawn, -drawn], dtype=torch.float64))
            dist.all_reduce(self._message, op=dist.ReduceOp.MAX)
            _, _, largest, smallest = self._message.tolist()
            _check_drawn(largest, -smallest)


def _check_drawn(largest: float, smallest: float) -> None:
    if largest != smallest:
        raise RanksDifferError(
            "the ranks have drawn different samples: data.sampler (or data.batch_sampler) does not draw the same on all ranks. "
            "It must use only the global generators of Python, NumPy or torch, which are seeded equally on all ranks for "
            "each epoch, and must not depend on the rank or on anything else that differs between processes"
        )


def sum_over_ranks(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Sum a CPU tensor over all ranks and return it on the CPU. Collective: every rank must call this."""
    return begin_sum_over_ranks(tensor, device)()


def begin_sum_over_ranks(tensor: torch.Tensor, device: torch.device) -> Callable[[], torch.Tensor]:
    """Start to sum a CPU tensor over all ranks; return a function that waits for the sum, not for work queued later.

    Collective: every rank must call this. The tensor must not be used until the sum is there.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return lambda: tensor
    if device.type != "cuda":
        moved = tensor.to(device)
        work: Any = dist.all_reduce(moved, async_op=True)

        def waited() -> torch.Tensor:
            work.wait()
            return moved.cpu()

        return waited
    moved = tensor.pin_memory().to(device, non_blocking=True)
    dist.all_reduce(moved)  # queued without blocking the host
    summed = torch.empty_like(tensor, pin_memory=True).copy_(moved, non_blocking=True)
    arrived: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
    arrived.record()

    def arrived_sum() -> torch.Tensor:
        arrived.synchronize()
        return summed

    return arrived_sum


def from_rank_0(value: Any, device: torch.device, group: dist.ProcessGroup | None = None) -> Any:
    """Broadcast a JSON-serializable value from rank 0. Collective: every rank must call this.

    Args:
        group: group of all ranks. Default: the default group.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    text = json.dumps(value).encode() if dist.get_rank() == 0 else b""
    length = torch.tensor([len(text)], device=device)
    dist.broadcast(length, 0, group=group)
    buffer = torch.zeros(int(length), dtype=torch.uint8, device=device)
    if dist.get_rank() == 0:
        buffer.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
    dist.broadcast(buffer, 0, group=group)
    return json.loads(bytes(buffer.cpu().tolist()))


def on_rank_0(function: Callable[[], Any], *, rank: int, device: torch.device) -> Any:
    """Call a function on rank 0; return its JSON-serializable result, or raise its LockstepError, on all ranks.

    Collective: every rank must call this.
    """
    reply: dict[str, Any] = {}
    if rank == 0:
        try:
            reply = {"value": function()}
        except ConfigurationError as error:
            reply = {"problems": [vars(problem) for problem in error.problems]}
        except LockstepError as error:
            reply = {"error": type(error).__name__, "message": str(error)}
    reply = from_rank_0(reply, device)
    if "problems" in reply:
        raise ConfigurationError([Problem(**problem) for problem in reply["problems"]])
    if "error" in reply:
        kinds = (CheckpointError, DivergenceError, PredictionError, RunFolderError)
        raise {kind.__name__: kind for kind in kinds}.get(reply["error"], LockstepError)(reply["message"])
    return reply["value"]


def gather_bytes(payload: bytes, device: torch.device, group: dist.ProcessGroup | None = None) -> list[bytes]:
    """Return every rank's bytes, in rank order, on every rank. Collective: every rank must call this.

    Short payloads take one message, which also holds the length; the rest of longer ones follows in a second message.

    Args:
        group: group of all ranks. Default: the default group.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [payload]
    first = len(payload).to_bytes(_LENGTH, "little") + payload[: _SHORT - _LENGTH]
    messages = _gather(first, _SHORT, device, group)
    lengths = [int.from_bytes(message[:_LENGTH], "little") for message in messages]
    parts = [message[_LENGTH : _LENGTH + length] for message, length in zip(messages, lengths, strict=True)]
    remaining = max(lengths) - (_SHORT - _LENGTH)
    if remaining <= 0:
        return parts
    rests = _gather(payload[_SHORT - _LENGTH :], remaining, device, group)
    return [(part + rest)[:length] for part, rest, length in zip(parts, rests, lengths, strict=True)]


def _gather(message: bytes, size: int, device: torch.device, group: dist.ProcessGroup | None) -> list[bytes]:
    """Return every rank's message, padded to ``size`` bytes."""
    own = torch.frombuffer(bytearray(message.ljust(size, b"\0")), dtype=torch.uint8).to(device)
    buffers = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(buffers, own, group=group)
    return [buffer.cpu().numpy().tobytes() for buffer in buffers]


def gather_on_rank_0(payload: bytes, device: torch.device) -> list[bytes]:
    """Return every rank's bytes, in rank order, on rank 0; an empty list elsewhere. Collective: every rank must call this."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [payload]
    rank, world_size = dist.get_rank(), dist.get_world_size()
    lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world_size)]
    dist.all_gather(lengths, torch.tensor([len(payload)], device=device))
    longest = max(int(n) for n in lengths)
    own = torch.zeros(longest, dtype=torch.uint8)
    own[: len(payload)] = torch.frombuffer(bytearray(payload or b"\0"), dtype=torch.uint8)[: len(payload)]
    own = own.to(device)
    buffers = [torch.empty_like(own) for _ in range(world_size)] if rank == 0 else None
    dist.gather(own, buffers, 0)
    return [buffer[: int(n)].cpu().numpy().tobytes() for buffer, n in zip(buffers or [], lengths, strict=False)]


def sum_by_name(terms: Mapping[str, Sequence[float]], device: torch.device) -> dict[str, float]:
    """Return the exact sum of each name's terms over all ranks, rounded once. Collective: every rank must call this.

    Args:
        terms: of this rank; ranks may lack names.
        device: of the kind that the process group uses.
    """
    own = {name: total.parts for name, total in exact_sums([terms]).items()}
    ranks = [json.loads(payload) for payload in gather_bytes(json.dumps(own).encode(), device)]
    return {name: total.value for name, total in exact_sums(ranks).items()}
