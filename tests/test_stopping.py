"""A wish to stop is known at once, whatever the main thread does; who does not leave in time is ended, and told why."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from runtime.distributed import stopping
from runtime.distributed.stopping import StopRequest

ROOT = Path(__file__).parent.parent
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
PRELUDE = '''
import ctypes, signal, sys, threading, time
from pathlib import Path
from runtime.distributed import stopping
from runtime.distributed.stopping import StopRequest

stopping._POLL_SECONDS = 0.02

def deaf(then=lambda unlock: None):
    """Wait in C where no signal ends the wait, so that no handler runs; ``then`` runs once the main thread is there."""
    libc, mutex, entered = ctypes.CDLL(None), ctypes.create_string_buffer(256), threading.Event()
    libc.pthread_mutex_init(mutex, None)
    libc.pthread_mutex_lock(mutex)

    def other():
        entered.wait()
        sys.setswitchinterval(0.005)
        print("ready", flush=True)
        then(lambda: libc.pthread_mutex_unlock(mutex))

    threading.Thread(target=other, daemon=True).start()
    sys.setswitchinterval(1000)  # nobody else runs until the main thread has left Python
    entered.set()
    libc.pthread_mutex_lock(mutex)

def busy():
    print("ready", flush=True)
    while True:
        pass

def tell_the_wish():
    while not wish or (wish.reason == "SIGINT" and not wish._interrupted_at):  # the watcher knows it too
        time.sleep(0.005)
    print(wish.reason, flush=True)

wish = StopRequest()
wish.install()
'''


@contextmanager
def started(script: str) -> Iterator[subprocess.Popen[str]]:
    """A process with a wish installed, once it says that it is ready."""
    line = [sys.executable, "-c", PRELUDE + script]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        too_late = threading.Timer(120, process.kill)
        too_late.start()
        try:
            assert said(process) == "ready"
            yield process
        finally:
            too_late.cancel()
            process.kill()


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


class Clock:
    """A clock that stands still until it is moved, and counts how often it was read."""

    def __init__(self) -> None:
        self.now, self.num_reads = 1000.0, 0

    def monotonic(self) -> float:
        self.num_reads += 1
        return self.now

    def look(self, now: float) -> None:
        """Move the clock and wait until the watcher has acted on the time."""
        self.now, seen = now, self.num_reads
        wait_until(lambda: self.num_reads > seen + 4)  # each look reads it twice at most


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "_POLL_SECONDS", 0.005)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(stopping, "time", SimpleNamespace(monotonic=made.monotonic))
    return made


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> list[int]:
    """The exit codes the process would have ended with; what would be on stderr is caught."""
    codes: list[int] = []
    monkeypatch.setattr(stopping, "_leave", codes.append)
    return codes


@pytest.fixture
def get_signal() -> Iterator[Callable[[int], None]]:
    """Send this process a signal and return once every watcher has dealt with it, for it passes bytes on when it has."""
    reader, writer = socket.socketpair()
    reader.settimeout(10)
    writer.setblocking(False)
    previous = signal.set_wakeup_fd(writer.fileno())

    def get(number: int) -> None:
        signal.raise_signal(number)
        assert reader.recv(1) == bytes([number])

    yield get
    assert signal.set_wakeup_fd(previous) == writer.fileno()
    reader.close()
    writer.close()


@pytest.fixture
def wish(get_signal: object) -> Iterator[StopRequest]:
    made = StopRequest()
    made.install()
    yield made
    made.uninstall()


# Signals


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_known_while_the_main_thread_is_not_in_python(number: signal.Signals) -> None:
    script = "def then(unlock): tell_the_wish(); unlock()\ndeaf(then)\nwish.uninstall()\nprint('left in order')"
    with started(script) as process:
        process.send_signal(number)
        assert said(process) == number.name
        assert said(process) == "left in order"
        assert process.wait(10) == 0


@pytest.mark.parametrize("main_thread", ["deaf", "busy"])
def test_a_second_interrupt_ends_the_process_wherever_it_is(main_thread: str) -> None:
    script = f"stopping._SAME_REQUEST_SECONDS = 0\nthreading.Thread(target=tell_the_wish, daemon=True).start()\n{main_thread}()"
    with started(script) as process:
        process.send_signal(signal.SIGINT)
        assert said(process) == "SIGINT"
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=120)
    assert process.returncode == 1
    first, *stacks = stderr.splitlines()
    assert first == "lockstep: interrupted again; exiting without a save, the last checkpoint counts"
    assert any(f" in {main_thread}" in line for line in stacks)


def test_one_ctrl_c_that_arrives_twice_is_one(
    wish: StopRequest, get_signal: Callable[[int], None], left: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stopping, "_SAME_REQUEST_SECONDS", 1e6)
    get_signal(signal.SIGINT)
    get_signal(signal.SIGINT)
    assert wish.reason == "SIGINT"
    assert left == []
    monkeypatch.setattr(stopping, "_SAME_REQUEST_SECONDS", 0)
    get_signal(signal.SIGINT)
    assert left == [1]


def test_no_other_signal_forces_an_end_however_often_it_comes(
    wish: StopRequest, get_signal: Callable[[int], None], left: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stopping, "_SAME_REQUEST_SECONDS", 0)
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        get_signal(number)
    assert wish.reason == "SIGTERM"
    assert left == []


def test_an_interactive_python_is_interrupted_and_lives() -> None:
    script = """
sys.ps1 = ">>> "  # as IPython and Jupyter set it
stopping._SAME_REQUEST_SECONDS = 0
threading.Thread(target=tell_the_wish, daemon=True).start()
for reason in ("a second Ctrl-C", "the grace time"):
    try:
        busy()
    except KeyboardInterrupt as interrupt:
        print(interrupt, flush=True)
    wish.grace_seconds = 0.1
wish.uninstall()
"""
    with started(script) as process:
        process.send_signal(signal.SIGINT)
        assert said(process) == "SIGINT"
        process.send_signal(signal.SIGINT)
        assert said(process).startswith("interrupted again")
        assert said(process) == "ready"
        assert said(process).startswith("asked to stop (SIGINT)")
        assert process.wait(10) == 0


# The file and the time limit


@pytest.fixture
def look(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Wait until the file has been looked for again."""
    fingerprint, num_looks = stopping._identity, 0

    def counted(path: Path) -> object:
        nonlocal num_looks
        found = fingerprint(path)
        num_looks += 1
        return found

    def wait() -> None:
        seen = num_looks
        wait_until(lambda: num_looks > seen + 2)

    monkeypatch.setattr(stopping, "_identity", counted)
    return wait


def test_a_file_that_appears_is_a_wish(wish: StopRequest, tmp_path: Path, look: Callable[[], None]) -> None:
    assert not wish.watch_file(tmp_path / "STOP")
    look()
    assert not wish
    (tmp_path / "STOP").touch()
    wait_until(lambda: wish)
    assert wish.reason == "the file STOP"


def test_a_file_left_over_from_before_is_no_wish_until_it_is_touched(
    wish: StopRequest, tmp_path: Path, look: Callable[[], None]
) -> None:
    (tmp_path / "STOP").touch()
    assert wish.watch_file(tmp_path / "STOP")
    look()
    assert not wish
    os.utime(tmp_path / "STOP", (0, 0))  # on another host's clock, which is behind
    wait_until(lambda: wish)


def test_a_file_left_over_from_before_may_be_removed_and_made_again(
    wish: StopRequest, tmp_path: Path, look: Callable[[], None]
) -> None:
    stop = tmp_path / "STOP"
    stop.touch()
    before = stop.stat()
    assert wish.watch_file(stop)
    stop.unlink()
    look()
    assert not wish
    stop.touch()
    os.utime(stop, ns=(before.st_atime_ns, before.st_mtime_ns))
    wait_until(lambda: wish)


def test_a_folder_that_is_not_there_holds_no_file(wish: StopRequest, tmp_path: Path, look: Callable[[], None]) -> None:
    assert not wish.watch_file(tmp_path / "nowhere" / "STOP")
    look()
    assert not wish


def test_signals_are_heard_while_the_file_server_is_silent(
    get_signal: Callable[[int], None], tmp_path: Path, left: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    hanging, over = threading.Event(), threading.Event()
    wish = StopRequest()
    wish.install()
    wish.watch_file(tmp_path / "STOP")

    def hang(path: Path) -> None:
        hanging.set()
        over.wait()

    monkeypatch.setattr(stopping, "_identity", hang)
    monkeypatch.setattr(stopping, "_SAME_REQUEST_SECONDS", 0)
    assert hanging.wait(10)
    get_signal(signal.SIGINT)
    get_signal(signal.SIGINT)
    assert left == [1]
    monkeypatch.setattr(stopping, "_PATIENCE_SECONDS", 0.01)
    wish.uninstall()
    over.set()


def test_the_time_limit_leaves_time_to_save(wish: StopRequest, clock: Clock) -> None:
    margin = 10.0
    wish.limit_time(60, since=1000, margin=lambda: margin)
    clock.look(1049)
    assert not wish
    margin = 11  # a save has taken longer
    wait_until(lambda: wish)
    assert wish.reason == "the time limit"


# The grace time


@pytest.mark.parametrize(
    "on_leave", ["print('outcome', flush=True)", "print('outcome', flush=True); 1 / 0", "time.sleep(1e6)", None]
)
def test_who_has_not_left_by_the_end_of_the_grace_time_is_ended(on_leave: str | None) -> None:
    script = f"def leave(): {on_leave}\nwish.on_leave = leave\n" if on_leave else ""
    script += "stopping._PATIENCE_SECONDS = 0.3\nwish.grace_seconds = 0.05\ndeaf()"
    with started(script) as process:
        process.send_signal(signal.SIGTERM)
        stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 1
    first, *stacks = stderr.splitlines()
    why = r"lockstep: asked to stop \(SIGTERM\) \d+ s ago and still busy; exiting without a save, the last checkpoint counts"
    assert re.fullmatch(why, first)
    assert any(" in deaf" in line for line in stacks)
    assert stdout == ("outcome\n" if on_leave and "outcome" in on_leave else "")


def test_the_grace_time_begins_with_the_wish_and_again_with_each_move(
    wish: StopRequest, get_signal: Callable[[int], None], clock: Clock, left: list[int]
) -> None:
    wish.grace_seconds = 120
    wish.limit_time(1e9, since=0, margin=lambda: 0)
    clock.look(5000)
    get_signal(signal.SIGTERM)
    clock.look(5119)
    assert left == []
    wish.restart_grace_time()
    clock.look(5238)
    assert left == []
    clock.look(5239)
    assert left == [1]


def test_without_a_grace_time_nobody_is_ended(
    wish: StopRequest, get_signal: Callable[[int], None], clock: Clock, left: list[int]
) -> None:
    get_signal(signal.SIGTERM)
    clock.now = 1e9
    get_signal(signal.SIGUSR1)
    assert left == []


# Other processes


def note_sigterm(pipe: Connection) -> None:
    signal.signal(signal.SIGTERM, lambda number, frame: pipe.send("handled"))
    pipe.send("ready")
    pipe.recv()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_a_child_writes_no_signals_to_its_parents_socket(method: str, wish: StopRequest) -> None:
    context: Any = multiprocessing.get_context(method)
    ours, theirs = context.Pipe()
    process = context.Process(target=note_sigterm, args=(theirs,))
    process.start()
    assert ours.recv() == "ready"
    os.kill(process.pid, signal.SIGTERM)
    assert ours.recv() == "handled"
    ours.send("end")
    process.join(10)
    wish.uninstall()  # after this all that was written has been read
    assert (process.exitcode, wish.reason) == (0, None)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_can_be_terminated_from_its_first_moment(wish: StopRequest) -> None:
    for _ in range(20):
        process = multiprocessing.get_context("fork").Process(target=signal.pause)
        process.start()
        process.terminate()
        process.join(10)
        process.kill()
        assert process.exitcode == -signal.SIGTERM
    wish.uninstall()
    assert wish.reason is None


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("workers_ignore", [True, False])
def test_a_signal_to_a_loader_worker_alone_is_no_wish(wish: StopRequest, workers_ignore: bool) -> None:
    from functools import partial

    import torch
    from torch.utils.data import DataLoader, Dataset

    from runtime.data.loading import _start_worker

    class Workers(Dataset[Any]):
        def __len__(self) -> int:
            return 40

        def __getitem__(self, index: int) -> torch.Tensor:
            return torch.tensor(os.getpid())

    ours, theirs = multiprocessing.Pipe(duplex=False)

    def note(worker: int) -> None:
        signal.signal(signal.SIGTERM, lambda number, frame: theirs.send(worker))

    loader = DataLoader(
        Workers(),
        num_workers=2,
        multiprocessing_context="fork",
        worker_init_fn=partial(_start_worker, None) if workers_ignore else note,
    )
    batches = iter(loader)
    first, second = int(next(batches)), int(next(batches))
    assert len({first, second, os.getpid()}) == 3
    os.kill(first, signal.SIGTERM)
    if not workers_ignore:
        assert ours.poll(10)
    assert len(list(batches)) == 38
    del batches
    wish.uninstall()
    assert wish.reason is None


# Taking over and giving back


def test_importing_it_imports_the_standard_library_alone() -> None:
    code = """
import sys
before = set(sys.modules)
import runtime.distributed.stopping
print({name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names) - {"runtime"})
"""
    line = [sys.executable, "-c", code]
    assert subprocess.run(line, capture_output=True, text=True, cwd=ROOT, check=True).stdout.strip() == "set()"


def test_nothing_is_left_behind_by_hundreds_of_runs(tmp_path: Path) -> None:
    def state() -> tuple[object, ...]:
        handlers = [signal.getsignal(number) for number in SIGNALS]
        fd = signal.set_wakeup_fd(-1)
        signal.set_wakeup_fd(fd)
        return set(os.listdir("/dev/fd")), set(threading.enumerate()), handlers, fd, list(stopping._installed)  # noqa: PTH208

    before = state()
    wish = StopRequest()
    for _ in range(200):
        wish.install()
        wish.watch_file(tmp_path / "STOP")
        wish.uninstall()
        wish.uninstall()
    assert state() == before


def test_a_wish_within_a_wish_reaches_both(wish: StopRequest, get_signal: Callable[[int], None]) -> None:
    inner = StopRequest()
    inner.install()
    get_signal(signal.SIGTERM)
    inner.uninstall()
    assert (wish.reason, inner.reason) == ("SIGTERM", "SIGTERM")
    assert signal.getsignal(signal.SIGTERM) == wish._note


def test_a_wake_up_file_closed_by_its_owner_is_forgotten() -> None:
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.fileno())
    wish = StopRequest()
    wish.install()
    reader.close()
    writer.close()
    wish.uninstall()
    assert signal.set_wakeup_fd(-1) == -1


def test_an_event_loop_around_a_run_still_gets_its_signals() -> None:
    async def run() -> str:
        loop, got = asyncio.get_running_loop(), asyncio.Event()
        loop.add_signal_handler(signal.SIGUSR2, got.set)
        wish = StopRequest()
        wish.install()
        signal.raise_signal(signal.SIGUSR2)
        await asyncio.wait_for(got.wait(), 10)
        signal.raise_signal(signal.SIGUSR1)
        wish.uninstall()
        loop.remove_signal_handler(signal.SIGUSR2)
        return str(wish.reason)

    assert asyncio.run(run()) == "SIGUSR1"


def test_another_thread_takes_no_signals_but_hears_of_the_file(tmp_path: Path) -> None:
    handlers = [signal.getsignal(number) for number in SIGNALS]
    wish = StopRequest()
    reasons: list[Any] = []

    def run() -> None:
        wish.install()
        wish.watch_file(tmp_path / "STOP")
        (tmp_path / "STOP").touch()
        with suppress(AssertionError):
            wait_until(lambda: wish)
        reasons.append(wish.reason)
        reasons.append([signal.getsignal(number) for number in SIGNALS])
        wish.uninstall()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert reasons == ["the file STOP", handlers]
