"""Ranks that die, raise, stop or hang: the others leave and name them; an orderly end is nobody's failure."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public all the same

from runtime.distributed.watchdog import CurrentPhase, Heartbeat, Watchdog, laggards
from runtime.errors import PeerError

_SILENCE_SECONDS = 1.0
_STALL_SECONDS = 1.0
_ENDED_WITHIN_SECONDS = 120
_STEP = 3  # where something happens
_SEEN_SECONDS = 0.4  # after which the others have heard where a rank is

# One server that has imported torch, from which each rank is forked: importing it in each would take seconds.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["tests.test_watchdog"])


class World:
    """Ranks that play a scene, each in its own process with its own standard error."""

    def __init__(self, folder: Path, size: int, scene: Callable[[Watchdog, int], None], *, agent: bool = False) -> None:
        self.folder = folder
        self.server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if agent else None
        self.port = self.server.port if self.server is not None else free_port()
        place = (size, self.port, folder, agent)
        self.ranks = [_processes.Process(target=live, args=(scene, rank, *place)) for rank in range(size)]
        for process in self.ranks:
            process.start()

    def end(self, *, without: tuple[int, ...] = ()) -> list[int | None]:
        """Wait for the ranks' ends and return their exit codes; some never end."""
        until = time.monotonic() + _ENDED_WITHIN_SECONDS
        expected = {process.sentinel for rank, process in enumerate(self.ranks) if rank not in without}
        while expected and time.monotonic() < until:
            expected -= set(wait(list(expected), until - time.monotonic()))
        return [process.exitcode for process in self.ranks]

    def told(self, rank: int) -> str:
        """Return what a rank wrote to standard error, without what torch's C++ says about lost connections."""
        text = (self.folder / f"{rank}.txt").read_text()
        return re.sub(
            r"(?m)^((\[rank\d\]:)?\[W.*|frame #.*|Exception raised from .*|<omitting python frames>|)\n", "", text
        )

    def close(self) -> None:
        for process in self.ranks:
            process.kill()  # a stopped one too
            process.join()
            process.close()


@contextmanager
def world(*args: Any, **kwargs: Any) -> Iterator[World]:
    made = World(*args, **kwargs)
    try:
        yield made
    finally:
        made.close()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def live(scene: Callable[[Watchdog, int], None], rank: int, size: int, port: int, folder: Path, agent: bool) -> None:
    """Be one rank. The store is hosted by rank 0, or outside, as by torchrun's agent."""
    os.dup2(os.open(folder / f"{rank}.txt", os.O_CREAT | os.O_WRONLY), 2)
    torch.set_num_threads(1)
    place: dict[str, Any] = {"init_method": f"tcp://127.0.0.1:{port}"}
    if agent:
        place = {"store": TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)}
    dist.init_process_group("gloo", rank=rank, world_size=size, timeout=timedelta(seconds=60), **place)
    watch = Watchdog(
        rank=rank,
        world_size=size,
        host=f"h{rank}",
        store=("127.0.0.1", port),
        silence_seconds=_SILENCE_SECONDS,
        stall_seconds=_STALL_SECONDS,
        prefix="launch/1",
    )
    watch.start()
    scene(watch, rank)
    os._exit(0)  # a gloo thread may abort an interpreter that shuts down in order


def train(watch: Watchdog, rank: int, *, culprit: int, act: Callable[[Watchdog], None], steps: int = 10_000) -> None:
    """Train as DDP does; one rank does something else when it gets its third batch."""
    try:
        for step in range(1, steps + 1):
            watch.position.enter("data", step)
            if (rank, step) == (culprit, _STEP):
                time.sleep(_SEEN_SECONDS)
                act(watch)
            watch.position.enter("forward", step)
            watch.position.enter("backward", step)
            dist.all_reduce(torch.ones(4))
    except RuntimeError as error:  # gloo's
        watch.report_failure(str(error), lost_contact=True)
        os._exit(3)  # not reached: the process has ended
    except IndexError as error:
        watch.report_failure(f"{type(error).__name__}: {error}")
        os._exit(1)


def scene(culprit: int, act: Callable[[Watchdog], None], **changes: Any) -> Callable[[Watchdog, int], None]:
    return partial(train, culprit=culprit, act=act, **changes)


def assert_told(text: str, rank: int, message: str) -> None:
    """Check that a rank told the message once, where it stood itself, and the stack of its main thread."""
    assert message in text
    assert text.count("lockstep: ") == 2, text
    assert f"this is rank {rank} (host h{rank}), in backward at step {_STEP}\n" in text
    assert f"lockstep: rank {rank} (host h{rank}), in backward at step {_STEP}:\nMainThread:\n" in text
    # In the collective, or already reporting what gloo raised in it: the two notices race.
    assert re.search(r"in train\n    (dist\.all_reduce\(torch\.ones\(4\)\)|watch\.report_failure\()", text)


def fail(watch: Watchdog) -> None:
    raise IndexError("no sample 7")


def die(watch: Watchdog) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def be_stopped(watch: Watchdog) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def hang(watch: Watchdog) -> None:
    threading.Event().wait()


def hold_the_gil(watch: Watchdog) -> None:
    ctypes.PyDLL(None).sleep(60)


def be_slow(watch: Watchdog) -> None:
    """Take longer than a hang may, with signs of life."""
    for _ in range(5):
        time.sleep(_STALL_SECONDS / 4)
        watch.position.enter("data", _STEP)


@pytest.mark.parametrize(("culprit", "agent"), [(1, False), (0, False), (1, True)])
def test_a_rank_that_raises_is_named_by_all_others_with_their_stacks(tmp_path: Path, culprit: int, agent: bool) -> None:
    with world(tmp_path, 3, scene(culprit, fail), agent=agent) as ranks:
        assert ranks.end() == [1, 1, 1]
        for rank in {0, 1, 2} - {culprit}:
            cause = f"rank {culprit} (host h{culprit}), in data at step 3, failed: IndexError: no sample 7; this is"
            assert_told(ranks.told(rank), rank, cause)
        assert ranks.told(culprit) == ""  # it tells its error itself


@pytest.mark.parametrize(("act", "least_seconds"), [(die, 0.0), (be_stopped, _SILENCE_SECONDS)])
def test_a_rank_that_is_killed_or_stopped_is_named(
    tmp_path: Path, act: Callable[[Watchdog], None], least_seconds: float
) -> None:
    """Lost connections tell of a killed rank before it has been silent for long."""
    with world(tmp_path, 3, scene(2, act)) as ranks:
        assert ranks.end(without=(2,))[:2] == [1, 1]
        for rank in (0, 1):
            text = ranks.told(rank)
            found = re.search(
                r"lockstep: rank 2 \(host h2\), in data at step 3, silent for (\S+) s: its process died, .* "
                rf"\(noticed by rank [01]\); this is rank {rank} \(host h{rank}\), in backward at step 3\n",
                text,
            )
            assert found, text
            assert least_seconds <= float(found[1]) < least_seconds + _SILENCE_SECONDS
            assert text.count("lockstep: ") == 2, text
            assert "MainThread:\n" in text


@pytest.mark.parametrize(("act", "state"), [(die, "is gone: its process ended"), (be_stopped, "is silent for")])
def test_a_lost_store_is_named(tmp_path: Path, act: Callable[[Watchdog], None], state: str) -> None:
    with world(tmp_path, 3, scene(0, act)) as ranks:
        assert ranks.end(without=(0,))[1:] == [1, 1]
        for rank in (1, 2):
            text = ranks.told(rank)
            store = f"lockstep: the store on 127.0.0.1:{ranks.port}, which rank 0 or its launch agent hosts, {state}"
            assert store in text
            assert f"; this is rank {rank} (host h{rank}), in backward at step 3\n" in text
            assert text.count("lockstep: ") == 2, text


def test_a_rank_that_hangs_is_told_from_those_that_wait_for_it(tmp_path: Path) -> None:
    with world(tmp_path, 3, scene(1, hang)) as ranks:
        assert ranks.end() == [1, 1, 1]
        hangs = "the run hangs (no progress for 1 s) at rank 1 (host h1), in data at step 3"
        message = f"lockstep: {hangs}; the others wait: rank 0"
        for rank in (0, 2):
            assert_told(ranks.told(rank), rank, message)
        assert "in hang\n    threading.Event().wait()" in ranks.told(1)


def test_a_rank_that_keeps_python_from_running_is_named_and_shows_its_stack(tmp_path: Path) -> None:
    with world(tmp_path, 2, scene(1, hold_the_gil)) as ranks:
        assert ranks.end() == [1, 1]
        assert_told(ranks.told(0), 0, "lockstep: rank 1 (host h1), in data at step 3, silent for 1 s")
        assert " in hold_the_gil\n" in ranks.told(1)


def end_in_order(watch: Watchdog, rank: int) -> None:
    """Let one rank keep the others waiting while it moves; then let another close its reports for a while."""
    train(watch, rank, culprit=1, act=be_slow, steps=4)
    dist.barrier()
    time.sleep((0, 0, 1.2 * _SILENCE_SECONDS)[rank])  # the store's host is among the first
    watch.stop()


def test_nobody_reports_an_orderly_end_though_ranks_are_slow_and_one_ends_late(tmp_path: Path) -> None:
    with world(tmp_path, 3, end_in_order) as ranks:
        assert ranks.end() == [0, 0, 0]
        assert [ranks.told(rank) for rank in range(3)] == ["", "", ""]


def end_at_once(watch: Watchdog, rank: int) -> None:
    train(watch, rank, culprit=1, act=lambda _: None, steps=4)
    watch.stop()


def test_a_notice_from_before_a_restart_is_not_heeded(tmp_path: Path) -> None:
    with world(tmp_path, 2, end_at_once, agent=True) as ranks:
        assert ranks.server is not None
        ranks.server.set("lockstep/launch/0/end", "rank 1 failed")
        assert ranks.end() == [0, 0]
        assert [ranks.told(rank) for rank in range(2)] == ["", ""]
        assert ranks.server.get("lockstep/launch/1/end") == b"in order"


def lose_the_store_at_the_end(watch: Watchdog, rank: int) -> None:
    dist.barrier()
    if rank == 1:
        time.sleep(_SILENCE_SECONDS / 4)
        watch.stop()


def test_a_store_that_goes_shortly_before_an_orderly_end_is_no_failure(tmp_path: Path) -> None:
    with world(tmp_path, 2, lose_the_store_at_the_end) as ranks:
        assert ranks.end() == [0, 0]
        assert ranks.told(1) == ""


def fail_together(watch: Watchdog, rank: int) -> None:
    dist.barrier()
    if rank == 0:
        threading.Event().wait()
    while rank == 2 and not watch._store.check(["end"]):
        time.sleep(0.001)
    watch.report_failure("ZeroDivisionError")
    os._exit(1)


def test_the_first_of_two_failures_is_told(tmp_path: Path) -> None:
    with world(tmp_path, 3, fail_together, agent=True) as ranks:
        assert ranks.end() == [1, 1, 1]
        assert ranks.server is not None
        assert ranks.server.get("lockstep/launch/1/end").startswith(
            b"rank 1 (host h1), in start at step 0, failed: Zero"
        )
        assert "lockstep: rank 1 (host h1), in start at step 0, failed: ZeroDivisionError; this is" in ranks.told(0)


def pause(watch: Watchdog, rank: int) -> None:
    if rank == 0:  # the store's host
        pid = os.getpid()
        if os.fork() == 0:
            time.sleep(_SILENCE_SECONDS / 2)
            os.kill(pid, signal.SIGCONT)
            os._exit(0)
        os.kill(pid, signal.SIGSTOP)
    dist.barrier()
    watch.stop()


def test_a_pause_shorter_than_a_silence_is_no_failure(tmp_path: Path) -> None:
    with world(tmp_path, 2, pause) as ranks:
        assert ranks.end() == [0, 0]
        assert [ranks.told(rank) for rank in range(2)] == ["", ""]


def deadlock(watch: Watchdog, rank: int) -> None:
    watch.position.enter("backward", 5)
    threading.Event().wait()


def test_where_no_rank_lags_nobody_is_blamed(tmp_path: Path) -> None:
    with world(tmp_path, 2, deadlock) as ranks:
        assert ranks.end() == [1, 1]
        for rank in range(2):
            assert "(host h1), in backward at step 5, and no rank is behind the others" in ranks.told(rank)
            assert "threading.Event().wait()" in ranks.told(rank)


def test_with_one_process_nothing_is_started() -> None:
    before = threading.active_count()
    watch = Watchdog(
        rank=0, world_size=1, host="h0", store=("nowhere", 1), silence_seconds=1, stall_seconds=1, prefix="alone"
    )
    watch.start()
    assert threading.active_count() == before
    watch.report_failure("nobody is told")
    watch.stop()


def test_a_store_that_cannot_be_reached_is_named() -> None:
    port = free_port()
    watch = Watchdog(
        rank=1, world_size=2, host="h1", store=("127.0.0.1", port), silence_seconds=0.2, stall_seconds=1, prefix="lost"
    )
    with pytest.raises(PeerError, match=f"the store on 127.0.0.1:{port}"):
        watch.start()


def test_changes_of_phase_are_counted_anew_in_each_step_and_every_entry_is_told_from_the_one_before() -> None:
    position = CurrentPhase()
    seen: list[Any] = []
    for phase, step in [("data", 7), ("data", 7), ("forward", 7), ("data", 8)]:
        position.enter(phase, step)
        assert all(position.now is not before for before in seen)
        seen.append(position.now)
    assert seen == [("data", 7, 0), ("data", 7, 0), ("forward", 7, 1), ("data", 8, 0)]


def beat(rank: int, phase: str, step: int, phase_changes: int, *, in_collective: bool = False) -> Heartbeat:
    return Heartbeat(1, rank, "h", phase, step, phase_changes, 60.0, in_collective)


@pytest.mark.parametrize(
    ("beats", "expected"),
    [
        ([beat(0, "backward", 7, 2), beat(1, "data", 7, 0), beat(2, "backward", 7, 2)], [1]),
        ([beat(0, "data", 8, 0), beat(1, "save", 7, 9), beat(2, "data", 8, 0)], [1]),
        ([beat(0, "backward", 7, 4), beat(1, "backward", 7, 2)], [1]),  # of an earlier microbatch
        ([beat(0, "data", 7, 0), beat(1, "data", 7, 0), beat(2, "backward", 7, 2)], [0, 1]),
        ([beat(0, "save", 7, 5), beat(1, "save", 7, 5, in_collective=True)], [0]),  # rank 0 writes, others wait for it
        ([beat(0, "save", 7, 5, in_collective=True), beat(1, "save", 7, 5, in_collective=True)], [0, 1]),
        (
            [beat(0, "step", 7, 3), beat(1, "data", 7, 0, in_collective=True)],
            [1],
        ),  # a collective that the other skipped
    ],
)
def test_who_has_made_fewest_moves_holds_the_others_up(beats: list[Heartbeat], expected: list[int]) -> None:
    assert [lagging.rank for lagging in laggards(beats)] == expected
