"""Decisions that all ranks take together.

What is decided between steps rides on one small all-reduce, started before a step's forward passes and read at its end,
when it is long complete, so that all ranks leave after the same step.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
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

_SECONDS_BETWEEN = 0.25  # a wish waits this long at most; the all-reduce then costs nothing to speak of
_MOST_STEPS_BETWEEN = 64
_SECONDS_AHEAD = 0.05  # a sum is worth waiting for in steps of half as long: it takes less than a hundredth of them
_MOST_STEPS_AHEAD = 8
_SHORT = 1024  # bytes of a message that one reduction takes no longer over than over a number
_LENGTH = 8


class StopConsensus:
    """The stop wish of any rank, made known to all at the same step; and whether they have drawn the same samples so far.

    Collective: every rank must call ``begin`` and ``end`` around every step. The message is 32 bytes, every n steps; n
    follows from the slowest rank's step time, which travels in the same message, so it is equal on all ranks.

    Args:
        drawn: returns a number below 2**53 that says what was drawn until the step that begins.
        world_size: number of processes; with one there is nothing to agree on and nothing is sent.
        device: where the message lives; the process group's kind of device.
    """

    def __init__(self, *, world_size: int, device: torch.device, drawn: Callable[[], int] = lambda: 0) -> None:
        self._world_size = world_size
        self._drawn = drawn
        self._message = torch.zeros(4, dtype=torch.float64, device=device)
        self._steps = 0
        self._due = 0
        self._since = (time.monotonic(), 0)
        self._wish = False
        self._seconds_per_step: float | None = None  # of the slowest rank, as all know it
        self._pending: Any = None

    def begin(self, wish: bool) -> None:
        """Start to make a wish known, if a message is due before this step."""
        self._wish = wish
        if self._world_size == 1 or self._steps < self._due:
            return
        now, (then, steps_then) = time.monotonic(), self._since
        seconds_per_step = (now - then) / max(1, self._steps - steps_then)
        self._since = (now, self._steps)
        drawn = float(self._drawn())  # the largest and, below zero, the smallest are the same where all are
        self._message.copy_(torch.tensor([float(wish), seconds_per_step, drawn, -drawn], dtype=torch.float64))
        self._pending = dist.all_reduce(self._message, op=dist.ReduceOp.MAX, async_op=True)

    def end(self) -> bool:
        """Tell whether any rank wished to stop; the same answer on every rank.

        Raises:
            RanksDifferError: they have drawn different samples; on every rank alike.
        """
        self._steps += 1
        if self._world_size == 1:
            return self._wish
        if self._pending is None:
            return False
        self._pending.wait()
        self._pending = None
        # Waits for the device, for a message begun a step ago.
        wish, seconds_per_step, largest, smallest = self._message.tolist()
        _check_drawn(largest, -smallest)
        self._seconds_per_step = seconds_per_step
        between = int(_SECONDS_BETWEEN / max(seconds_per_step, 1e-6))
        self._due = self._steps + max(1, min(_MOST_STEPS_BETWEEN, between)) - 1
        return bool(wish)

    @property
    def steps_ahead(self) -> int:
        """Over how many steps it pays to sum at once what must be known before each; equal on all ranks between two steps."""
        if self._world_size == 1 or self._seconds_per_step is None:
            return 1
        return max(1, min(_MOST_STEPS_AHEAD, int(_SECONDS_AHEAD / max(self._seconds_per_step, 1e-6))))

    def check_drawn(self) -> None:
        """Compare at once what the ranks have drawn. Collective: every rank must call this between two steps.

        Raises:
            RanksDifferError: they have drawn different samples; on every rank alike.
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
            "the ranks have drawn different samples: data.sampler (or data.batch_sampler) does not draw alike on all of them. "
            "It must draw from Python's, NumPy's or torch's global generator, which are seeded alike for each epoch, and ask "
            "neither for its rank nor for anything else that differs between processes"
        )


def sum_over_ranks(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Sum a CPU tensor over all ranks and return it on the CPU. Collective: every rank must call this."""
    return begin_sum_over_ranks(tensor, device)()


def begin_sum_over_ranks(tensor: torch.Tensor, device: torch.device) -> Callable[[], torch.Tensor]:
    """Begin to sum a CPU tensor over all ranks; what is returned waits for the sum, and for nothing that was queued later.

    Collective: every rank must call this. The tensor is not to be used until then.
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
    dist.all_reduce(moved)  # queued; the host does not wait
    summed = torch.empty_like(tensor, pin_memory=True).copy_(moved, non_blocking=True)
    arrived: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
    arrived.record()

    def arrived_sum() -> torch.Tensor:
        arrived.synchronize()
        return summed

    return arrived_sum


def from_rank_0(value: Any, device: torch.device, group: dist.ProcessGroup | None = None) -> Any:
    """Return rank 0's value of something that JSON can hold. Collective: every rank must call this.

    Args:
        group: of all ranks; default: the default one.
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


def on_rank_0(act: Callable[[], Any], *, rank: int, device: torch.device) -> Any:
    """Return on all ranks what rank 0 got, which JSON can hold, or raise on all what it raised of ours.

    Collective: every rank must call this.
    """
    reply: dict[str, Any] = {}
    if rank == 0:
        try:
            reply = {"value": act()}
        except ConfigurationError as error:
            reply = {"problems": [vars(problem) for problem in error.problems]}
        except LockstepError as error:
            reply = {"error": type(error).__name__, "message": str(error)}
    reply = from_rank_0(reply, device)
    if "problems" in reply:
        raise ConfigurationError([Problem(**problem) for problem in reply["problems"]])
    if "error" in reply:
        told = (CheckpointError, DivergenceError, PredictionError, RunFolderError)
        raise {kind.__name__: kind for kind in told}.get(reply["error"], LockstepError)(reply["message"])
    return reply["value"]


def gather_bytes(payload: bytes, device: torch.device, group: dist.ProcessGroup | None = None) -> list[bytes]:
    """Return every rank's bytes, in rank order, on every rank. Collective: every rank must call this.

    What is short travels with its length, in one message; the rest of what is not follows in a second.

    Args:
        group: of all ranks; default: the default one.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [payload]
    first = len(payload).to_bytes(_LENGTH, "little") + payload[: _SHORT - _LENGTH]
    told = _gather(first, _SHORT, device, group)
    lengths = [int.from_bytes(message[:_LENGTH], "little") for message in told]
    parts = [message[_LENGTH : _LENGTH + length] for message, length in zip(told, lengths, strict=True)]
    left = max(lengths) - (_SHORT - _LENGTH)
    if left <= 0:
        return parts
    rests = _gather(payload[_SHORT - _LENGTH :], left, device, group)
    return [(part + rest)[:length] for part, rest, length in zip(parts, rests, lengths, strict=True)]


def _gather(message: bytes, size: int, device: torch.device, group: dist.ProcessGroup | None) -> list[bytes]:
    """Return every rank's message, filled up to a size that is the same for all."""
    own = torch.frombuffer(bytearray(message.ljust(size, b"\0")), dtype=torch.uint8).to(device)
    buffers = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(buffers, own, group=group)
    return [buffer.cpu().numpy().tobytes() for buffer in buffers]


def gather_on_rank_0(payload: bytes, device: torch.device) -> list[bytes]:
    """Return every rank's bytes, in rank order, on rank 0; nothing elsewhere. Collective: every rank must call this."""
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


def sum_by_name(values: Mapping[str, float], device: torch.device) -> dict[str, float]:
    """Sum named numbers over all ranks, in rank order; a rank may lack names. Collective: every rank must call this."""
    return sum_in_order([json.loads(payload) for payload in gather_bytes(json.dumps(values).encode(), device)])


def sum_in_order(told: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Sum what ranks told by name, in their order."""
    total: dict[str, float] = {}
    for values in told:
        for name, value in values.items():
            total[name] = total.get(name, 0.0) + value
    return total
