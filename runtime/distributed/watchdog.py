"""Watching the other ranks: when one dies, raises or hangs, all leave within a bounded time and say which one it was.

Nothing here is a collective: the main thread may sit in one that will never end. A thread of each rank talks to the process
group's store over a connection of its own, and another one watches that the store answers. In the store lie

heartbeat/RANK  what a rank's main thread is doing, written about every second
end             how the run ended, from whoever comes first: a failure in words, or "in order"
acknowledged    how many ranks have read it; the launcher ends all as soon as one has left, so nobody leaves before
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
    """What a rank's main thread is doing. Costs nothing to speak of, and can be set where nobody watches.

    A move is a change of phase. Every rank makes the same moves in a step, so who has made fewest holds the others up: no
    change of phase stands under a rank-local condition. Entering a phase again is no move, but a sign of life.
    """

    __slots__ = ("now",)

    def __init__(self) -> None:
        self.now: tuple[str, int, int] = ("start", 0, 0)  # phase, step, moves within the step: replaced as a whole

    def enter(self, phase: str, step: int) -> None:
        """Say what the main thread does from here on."""
        last_phase, last_step, phase_changes = self.now
        self.now = (
            phase,
            step,
            0 if step != last_step else phase_changes if phase == last_phase else phase_changes + 1,
        )


@dataclass(frozen=True)
class Heartbeat:
    """What one rank tells about itself.

    Args:
        moves: changes of phase within the step.
        stood_seconds: since the main thread last entered a phase.
        in_collective: whether the main thread is inside ``torch.distributed``, as far as Python can see.
    """

    number: int
    rank: int
    host: str
    phase: str
    step: int
    phase_changes: int
    stood_seconds: float
    in_collective: bool

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}), in {self.phase} at step {self.step}"


def laggards(heartbeats: list[Heartbeat]) -> list[Heartbeat]:
    """Return those that the others wait for; all of them where that cannot be told."""
    least = min((beat.step, beat.phase_changes) for beat in heartbeats)
    behind = [beat for beat in heartbeats if (beat.step, beat.phase_changes) == least]
    return [beat for beat in behind if not beat.in_collective] or behind


def raised(reason: str) -> bool:
    """Tell whether a rank left for an error of its own, rather than that it, its host or its link was lost."""
    return _FAILED in reason


class Watchdog:
    """Watches the other ranks from ``start`` to ``stop``; ends this process when one of them fails.

    Durations are counted in turns of our own threads, so that a process that was itself stopped for a while does not take
    its own absence for another's. With one process nothing is started.

    Args:
        host: name of this host.
        store: address and port of the process group's store.
        silence_seconds: a rank or a store that has not answered for so long is lost.
        stall_seconds: a run hangs in which no rank's main thread enters a phase for so long (compiling takes minutes).
        prefix: of the keys; another one for each launch and each restart under one launch agent.
        tell: writes a text of one or more lines; by default to standard error.
        leave: ends the process at once; an orderly exit could wait for the lost rank.

    Attributes:
        on_leave: called with the reason before the process is ended here, in a thread of its own and waited for 2 s at most.
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
        tell: Callable[[str], None] | None = None,
        leave: Callable[[int], NoReturn] = os._exit,
    ) -> None:
        self.position = CurrentPhase()
        self.on_leave: Callable[[str], None] = lambda reason: None
        self._rank, self._world_size, self._host = rank, world_size, host
        self._address, self._prefix = store, prefix
        self._store_in_words = f"the store on {store[0]}:{store[1]}, which rank 0 or its launch agent hosts,"
        self._silence_seconds, self._stall_seconds = silence_seconds, stall_seconds
        # For others to have their say, and for an orderly end to be told from a lost store; shorter than a silence.
        self._grace_seconds = min(2.0, silence_seconds / 2)
        self._turn_seconds = min(1.0, silence_seconds / 10)
        self._tell, self._leave = tell or _tell_stderr, leave
        self._threads: list[threading.Thread] = []
        self._wake, self._over, self._telling = threading.Event(), threading.Event(), threading.Lock()
        self._last_word, self._farewell_seconds = _IN_ORDER, silence_seconds if rank == 0 else 0.0
        self._heartbeats = self._answers = 0
        self._patience_turns = self._turns(silence_seconds)
        self._neighbour: Heartbeat | None = None
        self._seen = self.position.now
        self._neighbour_turns = self._stood_turns = 0  # how long these two have not changed

    def start(self) -> None:
        """Watch, and be watched: the thread that calls this is the one whose position and stack are told.

        Raises:
            PeerError: the store cannot be reached.
        """
        if self._world_size == 1:
            return
        try:
            store = TCPStore(*self._address, is_master=False, timeout=timedelta(seconds=self._silence_seconds))
        except DistError as error:
            raise PeerError(f"{self._store_in_words} cannot be reached: {error}") from error
        self._store = PrefixStore(f"lockstep/{self._prefix}", store)
        self._main_thread = threading.get_ident()
        for run in (self._watch, self._guard):
            self._threads.append(threading.Thread(target=run, name=f"lockstep{run.__name__}", daemon=True))
            self._threads[-1].start()

    def stop(self) -> None:
        """End watching after an orderly run: every rank is past the last barrier, or raises the same error.

        Rank 0, whose process may host the store, waits until all others know; they return at once.
        """
        self._over.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(self._farewell_seconds + self._grace_seconds)

    def report_failure(self, cause: str, *, lost_contact: bool = False) -> None:
        """Tell all ranks that this one fails; return when those that answer have told it, or after a few seconds.

        Args:
            cause: what happened, with sample ids where they are known.
            lost_contact: a collective failed because another rank is gone. Which one is found out first, and this process
                then ends here, as all others do.
        """
        if not self._threads or self._over.is_set():
            return
        if lost_contact:  # all ranks come to this point, the one that looks at the lost rank too
            self._patience_turns = self._turns(self._grace_seconds) + 1
            self._threads[0].join(self._silence_seconds)
        self._last_word, self._farewell_seconds = f"{self._own()}{_FAILED}{cause}", self._grace_seconds
        self._wake.set()
        self._threads[0].join(3 * self._grace_seconds)
        self._over.set()

    # The thread that talks to the store: a call can block for ever where the store's host is stopped

    def _watch(self) -> None:
        try:
            while not self._wake.is_set():
                self._store.set(f"heartbeat/{self._rank}", json.dumps(asdict(self._own())))
                end = self._store.get("end").decode() if self._store.check(["end"]) else None  # get would wait
                self._answers += 1
                if end == _IN_ORDER:  # every rank is past the last barrier; what this one still does concerns no other
                    self._over.set()
                    break
                if end is not None:
                    self._fail(end, acknowledge=True)
                self._look_at_neighbour()
                self._look_for_a_hang()
                self._wake.wait(self._turn_seconds)
            self._post(self._last_word)
            self._acknowledge(self._farewell_seconds)
        except DistError as error:
            # An orderly end may be on its way, or the main thread's own error.
            if not self._over.wait(self._grace_seconds) and self._last_word == _IN_ORDER:
                self._fail(f"{self._store_in_words} is gone: its process ended or its connections were cut ({error})")

    def _own(self) -> Heartbeat:
        self._heartbeats += 1
        frame = sys._current_frames().get(self._main_thread)
        in_collective = frame is not None and "torch/distributed/" in frame.f_code.co_filename
        stood_seconds = self._stood_turns * self._turn_seconds
        return Heartbeat(self._heartbeats, self._rank, self._host, *self.position.now, stood_seconds, in_collective)

    def _read(self, rank: int) -> Heartbeat:
        key = f"heartbeat/{rank}"
        if not self._store.check([key]):
            return Heartbeat(0, rank, "unknown", *CurrentPhase().now, stood_seconds=0.0, in_collective=False)
        return Heartbeat(**json.loads(self._store.get(key)))

    def _post(self, end: str) -> None:
        self._store.compare_set("end", "", end)  # the first one stays

    def _look_at_neighbour(self) -> None:
        """Look at the next rank only: together, all ranks look at all at a cost that grows with their number."""
        last, self._neighbour = self._neighbour, self._read((self._rank + 1) % self._world_size)
        self._neighbour_turns = self._neighbour_turns + 1 if self._neighbour == last else 0
        if self._neighbour_turns >= self._patience_turns:
            self._post(
                f"{self._neighbour}, silent for {self._neighbour_turns * self._turn_seconds:g} s: its process died, was "
                f"stopped, keeps Python from running or cannot reach the store (noticed by rank {self._rank})"
            )

    def _look_for_a_hang(self) -> None:
        """Post who holds the others up. Rank 0 judges alone: should it be lost, that itself is the failure."""
        last, self._seen = self._seen, self.position.now
        self._stood_turns = self._stood_turns + 1 if self._seen is last else 0
        if self._rank != 0 or self._stood_turns < self._turns(self._stall_seconds):
            return
        beats = [self._read(rank) for rank in range(self._world_size)]
        if any(beat.stood_seconds < self._stall_seconds for beat in beats):
            return  # the others wait for a slow one
        behind = laggards(beats)
        others = [beat for beat in beats if beat not in behind]
        wait = f"; the others wait: {_listed(others)}" if others else ", and which one keeps the others cannot be told"
        self._post(f"the run hangs (no move for {self._stall_seconds:g} s) at {_listed(behind)}{wait}")

    def _acknowledge(self, seconds: float) -> None:
        """Count this rank among those who know, and wait for the others at most for so long."""
        known = self._store.add("acknowledged", 1)
        for _ in range(math.ceil(seconds / 0.05)):
            if known >= self._world_size:
                break
            time.sleep(0.05)
            known = self._store.add("acknowledged", 0)
            self._answers += 1

    # The thread that needs no store

    def _guard(self) -> None:
        """Leave when the store does not answer the other thread; when no thread gets its turn, faulthandler does."""
        answers, silent_turns = -1, 0
        while not self._over.wait(self._turn_seconds):
            # After the others have found this rank silent: theirs is the better message, and stacks follow it.
            faulthandler.dump_traceback_later(self._silence_seconds + 2 * self._grace_seconds, exit=True, file=2)
            last, answers = answers, self._answers
            silent_turns = silent_turns + 1 if answers == last else 0
            if silent_turns >= self._turns(self._silence_seconds):
                why = "its process was stopped, or the link to its host is cut"
                self._fail(f"{self._store_in_words} is silent for {self._silence_seconds:g} s: {why}")
        faulthandler.cancel_dump_traceback_later()

    def _turns(self, seconds: float) -> int:
        return math.ceil(seconds / self._turn_seconds)

    def _fail(self, text: str, *, acknowledge: bool = False) -> NoReturn:
        """Tell a failure and where this rank stands, and leave. Should one thread hang here, the other leaves."""
        if not self._telling.acquire(timeout=self._grace_seconds):
            self._leave(1)
        own = self._own()
        self._tell(f"lockstep: {text}; this is {own}\n")
        last_word = threading.Thread(target=self.on_leave, args=(text,), name="lockstep-last-word", daemon=True)
        last_word.start()
        last_word.join(self._grace_seconds)  # a dead file server would keep it
        self._tell(f"lockstep: {own}:\n{_stacks(self._main_thread)}")  # reads sources, and can hang with their disk
        if acknowledge:
            self._acknowledge(0.0)
            time.sleep(self._grace_seconds)  # the failed rank leaves first: torchrun calls the first the root cause
        with suppress(Exception):
            sys.stdout.flush()
        self._leave(1)


def _tell_stderr(text: str) -> None:
    with (
        suppress(OSError),
        open(2, "w", closefd=False, errors="replace") as stderr,
    ):  # nobody may read it; a hanging thread may hold sys.stderr's lock
        stderr.write(text)


def _listed(heartbeats: list[Heartbeat]) -> str:
    more = f"; and {len(heartbeats) - 8} more" if len(heartbeats) > 8 else ""
    return "; ".join(map(str, heartbeats[:8])) + more


def _stacks(first: int) -> str:
    """Return the Python stacks of all threads but Lockstep's own, one of them first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sys._current_frames()
    return "".join(
        f"{names.get(ident, 'a thread')}:\n{''.join(traceback.format_stack(frames[ident]))}"
        for ident in sorted(frames, key=lambda ident: ident != first)
        if not names.get(ident, "").startswith("lockstep")
    )
