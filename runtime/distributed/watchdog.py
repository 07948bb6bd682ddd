"""Watch the other ranks: when one dies, raises or hangs, all exit within a bounded time and report which one it was.

No collectives are used: the main thread may be in one that will never end. A thread of each rank uses the process group's
store over a separate connection, and another thread checks that the store answers. Keys in the store:

heartbeat/RANK  what a rank's main thread is doing, written about every second
end             how the run ended, written by the first rank that knows: the message of a failure, or "in order"
acknowledged    how many ranks have read it; all wait for it, since the launcher kills the others as soon as one has exited
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import NoReturn

from torch.distributed import DistError, PrefixStore, TCPStore  # type: ignore[attr-defined]  # public all the same

from runtime.errors import PeerError

_IN_ORDER = "in order"
_FAILED = ", failed: "


class CurrentPhase:
    """What a rank's main thread is doing. Cheap, and may be set without a watchdog.

    Every rank makes the same phase changes in a step, so the rank with the fewest is the straggler: no phase change may depend
    on a rank-local condition. Entering the same phase again is not a change, but shows that the rank is alive.
    """

    __slots__ = ("now",)

    def __init__(self) -> None:
        self.now: tuple[str, int, int] = (
            "start",
            0,
            0,
        )  # phase, step, phase changes within the step: replaced as a whole

    def enter(self, phase: str, step: int) -> None:
        """Set the phase and step of the main thread."""
        last_phase, last_step, phase_changes = self.now
        self.now = (
            phase,
            step,
            0 if step != last_step else phase_changes if phase == last_phase else phase_changes + 1,
        )


@dataclass(frozen=True)
class Heartbeat:
    """State of one rank, as written to the store.

    Args:
        number: counter of the rank's heartbeats.
        phase_changes: changes of phase within the step.
        idle_seconds: time since the main thread last entered a phase.
        in_collective: whether the main thread's Python frame is in ``torch.distributed``.
    """

    number: int
    rank: int
    host: str
    phase: str
    step: int
    phase_changes: int
    idle_seconds: float
    in_collective: bool

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}), in {self.phase} at step {self.step}"


def laggards(heartbeats: list[Heartbeat]) -> list[Heartbeat]:
    """Return the ranks that the others wait for; all ranks if none is behind."""
    least = min((beat.step, beat.phase_changes) for beat in heartbeats)
    behind = [beat for beat in heartbeats if (beat.step, beat.phase_changes) == least]
    return [beat for beat in behind if not beat.in_collective] or behind


def is_rank_error(reason: str) -> bool:
    """Return whether a rank exited because of an error it raised, rather than because it, its host or its link was lost."""
    return _FAILED in reason


class Watchdog:
    """Watches the other ranks from ``start`` to ``stop``; ends this process when one of them fails.

    Durations are counted in iterations of these threads, so that a process that was suspended for a while does not take its
    own silence for another rank's. With one process nothing is started.

    Args:
        host: name of this host.
        store: address and port of the process group's store.
        silence_seconds: timeout after which a rank or store that does not answer is lost.
        stall_seconds: timeout after which a run hangs if no rank's main thread enters a phase (compiling takes minutes).
        prefix: prefix of the store's keys; different for each launch and each restart under one launch agent.
        report: writes a message of one or more lines. Default: to stderr.
        leave: ends the process at once; an orderly exit could wait for the lost rank.

    Attributes:
        on_leave: called with the reason before the process is ended, in a separate thread; waited for 2 s at most.
    """

    def __init__(
        self,
        *,
        rank: int,
        world_size: int,
        host: str,
        store: tuple[str, int],
        silence_seconds: float,
        stall_seconds: float,
        prefix: str,
        report: Callable[[str], None] | None = None,
        leave: Callable[[int], NoReturn] = os._exit,
    ) -> None:
        self.position = CurrentPhase()
        self.on_leave: Callable[[str], None] = lambda reason: None
        self._rank, self._world_size, self._host = rank, world_size, host
        self._address, self._prefix = store, prefix
        self._store_description = f"the store on {store[0]}:{store[1]}, which rank 0 or its launch agent hosts,"
        self._silence_seconds, self._stall_seconds = silence_seconds, stall_seconds
        # For other ranks to report first, and to distinguish an orderly end from a lost store; shorter than silence_seconds.
        self._grace_seconds = min(2.0, silence_seconds / 2)
        self._turn_seconds = min(1.0, silence_seconds / 10)
        self._report, self._leave = report or _write_stderr, leave
        self._threads: list[threading.Thread] = []
        self._wake, self._over, self._failing = threading.Event(), threading.Event(), threading.Lock()
        self._final_status, self._shutdown_timeout = _IN_ORDER, silence_seconds if rank == 0 else 0.0
        self._heartbeats = self._answers = 0
        self._patience_turns = self._turns(silence_seconds)
        self._neighbour: Heartbeat | None = None
        self._seen = self.position.now
        self._neighbour_turns = self._idle_turns = 0  # turns without a change of these two

    def start(self) -> None:
        """Start the threads; the calling thread is the main thread, whose phase and stack are reported.

        Raises:
            PeerError: the store cannot be reached.
        """
        if self._world_size == 1:
            return
        try:
            store = TCPStore(*self._address, is_master=False, timeout=timedelta(seconds=self._silence_seconds))
        except DistError as error:
            raise PeerError(f"{self._store_description} cannot be reached: {error}") from error
        self._store = PrefixStore(f"lockstep/{self._prefix}", store)
        self._main_thread = threading.get_ident()
        for run in (self._watch, self._guard):
            self._threads.append(threading.Thread(target=run, name=f"lockstep{run.__name__}", daemon=True))
            self._threads[-1].start()

    def stop(self) -> None:
        """Stop watching after an orderly run: every rank is past the last barrier, or raises the same error.

        Rank 0, whose process may host the store, waits until all others have read it; they return at once.
        """
        self._over.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(self._shutdown_timeout + self._grace_seconds)

    def report_failure(self, cause: str, *, lost_contact: bool = False) -> None:
        """Report the failure of this rank to all others; return when they have read it, or after a few seconds.

        Args:
            cause: what happened, with sample ids if known.
            lost_contact: a collective failed because another rank is gone. The watchdog then first finds out which one, and
                ends this process, as on all other ranks.
        """
        if not self._threads or self._over.is_set():
            return
        if lost_contact:  # all ranks get here, including the one that watches the lost rank
            self._patience_turns = self._turns(self._grace_seconds) + 1
            self._threads[0].join(self._silence_seconds)
        self._final_status, self._shutdown_timeout = f"{self._own()}{_FAILED}{cause}", self._grace_seconds
        self._wake.set()
        self._threads[0].join(3 * self._grace_seconds)
        self._over.set()

    # The thread that uses the store: a call can block forever if the store's host is stopped

    def _watch(self) -> None:
        try:
            while not self._wake.is_set():
                self._store.set(f"heartbeat/{self._rank}", json.dumps(asdict(self._own())))
                end = self._store.get("end").decode() if self._store.check(["end"]) else None  # get would wait
                self._answers += 1
                if end == _IN_ORDER:  # every rank is past the last barrier; the others no longer depend on this one
                    self._over.set()
                    break
                if end is not None:
                    self._fail(end, acknowledge=True)
                self._check_neighbour()
                self._check_for_hang()
                self._wake.wait(self._turn_seconds)
            self._post(self._final_status)
            self._acknowledge(self._shutdown_timeout)
        except DistError as error:
            # An orderly end may be about to come, or an error of the main thread.
            if not self._over.wait(self._grace_seconds) and self._final_status == _IN_ORDER:
                self._fail(
                    f"{self._store_description} is gone: its process ended or its connections were cut ({error})"
                )

    def _own(self) -> Heartbeat:
        self._heartbeats += 1
        frame = sys._current_frames().get(self._main_thread)
        in_collective = frame is not None and "torch/distributed/" in frame.f_code.co_filename
        idle_seconds = self._idle_turns * self._turn_seconds
        return Heartbeat(self._heartbeats, self._rank, self._host, *self.position.now, idle_seconds, in_collective)

    def _read(self, rank: int) -> Heartbeat:
        key = f"heartbeat/{rank}"
        if not self._store.check([key]):
            return Heartbeat(0, rank, "unknown", *CurrentPhase().now, idle_seconds=0.0, in_collective=False)
        return Heartbeat(**json.loads(self._store.get(key)))

    def _post(self, end: str) -> None:
        self._store.compare_set("end", "", end)  # the first value stays

    def _check_neighbour(self) -> None:
        """Check the next rank only: together all are checked, at a cost linear in their number."""
        last, self._neighbour = self._neighbour, self._read((self._rank + 1) % self._world_size)
        self._neighbour_turns = self._neighbour_turns + 1 if self._neighbour == last else 0
        if self._neighbour_turns >= self._patience_turns:
            self._post(
                f"{self._neighbour}, silent for {self._neighbour_turns * self._turn_seconds:g} s: its process died, was "
                f"stopped, holds the GIL or cannot reach the store (noticed by rank {self._rank})"
            )

    def _check_for_hang(self) -> None:
        """Publish the straggler of a hang. Only rank 0 does: if it is lost, that is the failure."""
        last, self._seen = self._seen, self.position.now
        self._idle_turns = self._idle_turns + 1 if self._seen is last else 0
        if self._rank != 0 or self._idle_turns < self._turns(self._stall_seconds):
            return
        beats = [self._read(rank) for rank in range(self._world_size)]
        if any(beat.idle_seconds < self._stall_seconds for beat in beats):
            return  # the others wait for a slow one
        behind = laggards(beats)
        others = [beat for beat in beats if beat not in behind]
        wait = f"; the others wait: {_listed(others)}" if others else ", and no rank is behind the others"
        self._post(f"the run hangs (no progress for {self._stall_seconds:g} s) at {_listed(behind)}{wait}")

    def _acknowledge(self, seconds: float) -> None:
        """Count this rank as one that has read the end, and wait at most ``seconds`` for the others."""
        count = self._store.add("acknowledged", 1)
        for _ in range(math.ceil(seconds / 0.05)):
            if count >= self._world_size:
                break
            time.sleep(0.05)
            count = self._store.add("acknowledged", 0)
            self._answers += 1

    # The thread that does not use the store

    def _guard(self) -> None:
        """Exit when the store does not answer the other thread; if no thread runs, faulthandler ends the process."""
        answers, silent_turns = -1, 0
        while not self._over.wait(self._turn_seconds):
            # Later than the others report this rank as silent: their message is better, and these stacks follow it.
            faulthandler.dump_traceback_later(self._silence_seconds + 2 * self._grace_seconds, exit=True, file=2)
            last, answers = answers, self._answers
            silent_turns = silent_turns + 1 if answers == last else 0
            if silent_turns >= self._turns(self._silence_seconds):
                why = "its process was stopped, or the link to its host is cut"
                self._fail(f"{self._store_description} is silent for {self._silence_seconds:g} s: {why}")
        faulthandler.cancel_dump_traceback_later()

    def _turns(self, seconds: float) -> int:
        return math.ceil(seconds / self._turn_seconds)

    def _fail(self, text: str, *, acknowledge: bool = False) -> NoReturn:
        """Report a failure and this rank's state, and exit. If one thread hangs here, the other exits."""
        if not self._failing.acquire(timeout=self._grace_seconds):
            self._leave(1)
        own = self._own()
        self._report(f"lockstep: {text}; this is {own}\n")
        on_leave = threading.Thread(target=self.on_leave, args=(text,), name="lockstep-on-leave", daemon=True)
        on_leave.start()
        on_leave.join(self._grace_seconds)  # it could hang with a dead file server
        self._report(
            f"lockstep: {own}:\n{_stacks(self._main_thread)}"
        )  # reads source files, and can hang with their disk
        if acknowledge:
            self._acknowledge(0.0)
            time.sleep(self._grace_seconds)  # the failed rank exits first: torchrun reports the first as the root cause
        with suppress(Exception):
            sys.stdout.flush()
        self._leave(1)


def _write_stderr(text: str) -> None:
    with (
        suppress(OSError),
        open(2, "w", closefd=False, errors="replace") as stderr,
    ):  # the reader may be gone; a hanging thread may hold sys.stderr's lock
        stderr.write(text)


def _listed(heartbeats: list[Heartbeat]) -> str:
    more = f"; and {len(heartbeats) - 8} more" if len(heartbeats) > 8 else ""
    return "; ".join(map(str, heartbeats[:8])) + more


def _stacks(first: int) -> str:
    """Return the Python stacks of all threads except Lockstep's, thread ``first`` first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sys._current_frames()
    return "".join(
        f"{names.get(ident, 'a thread')}:\n{''.join(traceback.format_stack(frames[ident]))}"
        for ident in sorted(frames, key=lambda ident: ident != first)
        if not names.get(ident, "").startswith("lockstep")
    )
