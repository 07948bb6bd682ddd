"""Of two jobs on one run folder only one writes."""

from __future__ import annotations

import errno
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from launch.schedulers import own_job
from runtime.checkpoints.run_lock import RunLock
from runtime.errors import RunFolderError
from runtime.session import train
from tests.observed import configuration

ROOT = Path(__file__).parent.parent
SHORT = 0.6  # seconds until a lock that stands still is taken over; the counter moves every tenth of a second
LONG = 600.0  # nobody waits for so long: what takes over does so at once

# A job of its own, which does what it is told line by line and says what came of it.
JOB = """
import sys
from pathlib import Path
from runtime.errors import RunFolderError
from runtime.checkpoints.run_lock import RunLock

class Waits(Exception):
    pass

def refuse(message):
    raise Waits

print("ready", flush=True)
for line in sys.stdin:
    command, *words = line.split()
    try:
        if command == "acquire":
            folder, seconds = words
            fence = RunLock(Path(folder), job=None, restart=0, fence_seconds=float(seconds), wait=refuse)
        said = getattr(fence, command)()
    except Waits:
        said = "waits"
    except RunFolderError as error:
        said = error
    print(said, flush=True)
"""


class Job:
    """Another process that is told what to do with a fence."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", JOB], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        assert self.answer() == "ready"

    def tell(self, *words: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()

    def answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def do(self, *words: object) -> str:
        self.tell(*words)
        return self.answer()

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def start() -> Iterator[Callable[[], Job]]:
    jobs: list[Job] = []

    def started() -> Job:
        jobs.append(Job())
        return jobs[-1]

    yield started
    for job in jobs:
        job.close()


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., RunLock]]:
    """Fences on one folder, released at the end."""
    run_locks: list[RunLock] = []

    def made(
        job: str | None = None, restart: int = 0, seconds: float = SHORT, wait: Callable[[str], None] | None = None
    ) -> RunLock:
        run_lock = RunLock(tmp_path, job=job, restart=restart, fence_seconds=seconds, wait=wait or refuse)
        run_locks.append(run_lock)
        return run_lock

    yield made
    for run_lock in run_locks:
        run_lock.release()


class WaitsError(Exception):
    """Raised instead of waiting."""


def refuse(message: str) -> None:
    raise WaitsError(message)


def newest(folder: Path) -> Path:
    return max(folder.glob("fence-*.json"))


def locks(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def lock(folder: Path, number: int = 1, **changes: Any) -> Path:
    """Write the lock of a process on another machine that is no more."""
    values = {
        "token": secrets.token_hex(8), "job": None, "restart": 0, "host": "elsewhere", "machine": "another boot 1",
        "pid": 4242, "started": 17, "fence_seconds": SHORT, "released": 0, "counter": "000000000007",
    }  # fmt: skip
    path = folder / f"fence-{number:06}.json"
    path.write_text(json.dumps(values | changes))
    return path


def lock_of_the_dead(folder: Path, number: int = 1) -> Path:
    """Write the lock of a process that was killed on this machine."""
    me = RunLock(folder, job=None, restart=0, wait=refuse)._own
    return lock(folder, number, host=me.host, machine=me.machine, pid=dead_process(), started=1, fence_seconds=LONG)


@cache
def dead_process() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        return process.pid


def test_the_first_job_gets_the_folder_and_makes_it(tmp_path: Path) -> None:
    run_lock = RunLock(tmp_path / "runs" / "a", job="7", restart=2, wait=refuse)
    assert run_lock.acquire() is False
    run_lock.check()
    values = json.loads(newest(tmp_path / "runs" / "a").read_text())
    assert (values["job"], values["restart"], values["pid"]) == ("7", 2, os.getpid())
    run_lock.release()


def test_a_second_job_is_refused_while_the_first_one_lives(
    tmp_path: Path, start: Callable[[], Job], make: Callable[..., RunLock]
) -> None:
    first = start()
    assert first.do("acquire", tmp_path, SHORT) == "False"
    told: list[str] = []
    # The first one's counter moves every 0.1 s; the second one would watch for 6 s.
    with pytest.raises(RunFolderError, match="another job is writing to") as error:
        make(job="9", seconds=LONG / 100, wait=told.append).acquire()
    for text in (str(error.value), *told):
        assert f"process {first.process.pid} on host" in text
    assert "choose another output" in str(error.value)
    assert len(told) == 1
    assert "up to 6 s" in told[0]
    assert first.do("check") == "None"


def test_a_killed_job_is_restarted_on_the_same_machine_without_a_wait(
    tmp_path: Path, start: Callable[[], Job], make: Callable[..., RunLock]
) -> None:
    first = start()
    assert first.do("acquire", tmp_path, LONG) == "False"
    first.signal(signal.SIGKILL)
    # Not waited for: what is left of it is a zombie, as in a container whose first process collects none.
    os.waitid(os.P_PID, first.process.pid, os.WEXITED | os.WNOWAIT)
    second = make(seconds=LONG)
    assert second.acquire() is True
    second.check()
    first.close()
    second.release()
    assert make(seconds=LONG).acquire() is False


def test_a_process_id_that_was_given_to_another_process_is_a_dead_owner(
    tmp_path: Path, make: Callable[..., RunLock]
) -> None:
    here = make()._own
    lock(tmp_path, host=here.host, machine=here.machine, pid=os.getpid(), started=1, fence_seconds=LONG)
    assert make(seconds=LONG).acquire() is True


@pytest.mark.parametrize("unlike", ["host", "machine"])
def test_a_dead_process_id_says_nothing_about_another_machine(
    tmp_path: Path, make: Callable[..., RunLock], unlike: str
) -> None:
    path = lock_of_the_dead(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {unlike: "another"}))
    with pytest.raises(WaitsError, match="up to 600 s"):
        make().acquire()


def test_a_stopped_job_is_replaced_and_stops_writing_when_it_wakes_up(
    tmp_path: Path, start: Callable[[], Job], make: Callable[..., RunLock]
) -> None:
    first = start()
    assert first.do("acquire", tmp_path, SHORT) == "False"
    first.signal(signal.SIGSTOP)
    second = make(job="12", wait=[].append)
    assert second.acquire() is True
    first.signal(signal.SIGCONT)
    said = first.do("check")
    assert f"was taken over by job 12 (restart 0), process {os.getpid()} on host" in said
    assert "this process stops writing" in said
    assert first.do("release") == "None"
    second.check()
    assert locks(tmp_path) == ["fence-000002.json"]


def test_a_later_restart_of_the_same_job_takes_over_at_once(tmp_path: Path, make: Callable[..., RunLock]) -> None:
    lock(tmp_path, job="7", restart=1, fence_seconds=LONG)
    run_lock = make(job="7", restart=2, seconds=LONG)
    assert run_lock.acquire() is True
    run_lock.check()


@pytest.mark.parametrize(("job", "restart"), [("7", 0), ("7", 1), ("8", 2), (None, 2)])
def test_no_other_job_and_no_earlier_restart_takes_over_at_once(
    tmp_path: Path, make: Callable[..., RunLock], job: str | None, restart: int
) -> None:
    lock(tmp_path, job="7" if job else None, restart=1)
    with pytest.raises(WaitsError):
        make(job=job, restart=restart).acquire()


def test_a_lock_from_elsewhere_is_taken_over_when_its_counter_stands_still(
    tmp_path: Path, make: Callable[..., RunLock]
) -> None:
    lock(tmp_path, job="3")
    told: list[str] = []
    run_lock = make(wait=told.append)
    assert run_lock.acquire() is True
    run_lock.check()
    assert len(told) == 1
    assert "job 3 (restart 0), process 4242 on host elsewhere" in told[0]
    assert locks(tmp_path) == ["fence-000002.json"]


def test_a_lock_from_elsewhere_whose_counter_moves_is_respected(tmp_path: Path, make: Callable[..., RunLock]) -> None:
    path = lock(tmp_path)
    content = path.read_text()

    def move(message: str) -> None:
        path.write_text(content.replace("000000000007", "000000000008"))

    with pytest.raises(RunFolderError, match="process 4242 on host elsewhere; wait for it, stop it"):
        make(wait=move).acquire()
    assert locks(tmp_path) == ["fence-000001.json"]


def test_the_other_side_is_given_the_time_that_it_needs(tmp_path: Path, make: Callable[..., RunLock]) -> None:
    lock(tmp_path, fence_seconds=LONG)  # whose counter moves only every LONG / 6
    with pytest.raises(WaitsError, match="up to 600 s"):
        make(seconds=SHORT).acquire()


def test_time_in_which_the_contender_slept_does_not_count(
    tmp_path: Path, make: Callable[..., RunLock], monkeypatch: pytest.MonkeyPatch
) -> None:
    lock(tmp_path)
    clock = iter(range(0, 100_000, 100))
    monkeypatch.setattr("runtime.checkpoints.run_lock.time.monotonic", lambda: next(clock))
    run_lock = make(wait=[].append)
    looks: list[int] = []
    look = run_lock._look

    def counted() -> Any:
        looks.append(1)
        return look()

    monkeypatch.setattr(run_lock, "_look", counted)
    assert run_lock.acquire() is True
    assert len(looks) > 10


@pytest.mark.parametrize("content", [b"", b'{"token": "ab', b"[1]", b"\x00" * 300, b"\xff\xfe", b'{"token": 1}'])
def test_a_damaged_lock_counts_as_one_that_stands_still(
    tmp_path: Path, make: Callable[..., RunLock], content: bytes
) -> None:
    (tmp_path / "fence-000004.json").write_bytes(content)
    told: list[str] = []
    assert make(seconds=0.1, wait=told.append).acquire() is True
    assert "damaged" in told[0]
    assert locks(tmp_path) == ["fence-000005.json"]


def test_files_of_other_names_are_no_locks(tmp_path: Path, make: Callable[..., RunLock]) -> None:
    for name in ("fence-000009.json.bak", "fence-x.json", ".fence-000009.json"):
        (tmp_path / name).write_text("")
    assert make().acquire() is False
    assert (tmp_path / "fence-000001.json").is_file()


def test_a_released_folder_is_free_at_once(tmp_path: Path, make: Callable[..., RunLock]) -> None:
    for number in (1, 2, 3):
        run_lock = make(seconds=LONG)
        assert run_lock.acquire() is False
        run_lock.check()
        assert locks(tmp_path) == [f"fence-{number:06}.json"]
        run_lock.release()
        run_lock.release()


def test_a_release_is_seen_by_a_job_that_waits(tmp_path: Path, make: Callable[..., RunLock]) -> None:
    first = make(seconds=LONG)
    first.acquire()
    assert make(seconds=SHORT, wait=lambda message: first.release()).acquire() is False


def test_releasing_what_was_never_acquired_or_is_lost_does_nothing(
    tmp_path: Path, make: Callable[..., RunLock]
) -> None:
    make().release()
    assert locks(tmp_path) == []
    first = make(job="7", seconds=LONG)
    first.acquire()
    second = make(job="7", restart=1, seconds=LONG)
    second.acquire()
    first.release()
    second.check()
    assert json.loads(newest(tmp_path).read_text())["released"] == 0


def test_a_removed_or_damaged_lock_ends_its_owner(tmp_path: Path, make: Callable[..., RunLock]) -> None:
    run_lock = make()
    run_lock.acquire()
    newest(tmp_path).write_text("{")
    with pytest.raises(RunFolderError, match="removed or damaged; this process stops writing"):
        run_lock.check()
    newest(tmp_path).unlink()
    with pytest.raises(RunFolderError, match="removed or damaged; this process stops writing"):
        run_lock.check()


def test_the_counter_of_a_replaced_owner_touches_nothing(tmp_path: Path, make: Callable[..., RunLock]) -> None:
    """An owner that was stopped after it had opened its lock, and before it wrote."""
    first = make(job="7", seconds=LONG)
    first.acquire()
    second = make(job="7", restart=1, seconds=LONG)
    content = first._content
    first._content = lambda **released: (second.acquire(), content(**released))[1]  # type: ignore[method-assign]
    first._raise_counter()
    second.check()
    assert locks(tmp_path) == ["fence-000002.json"]
    with pytest.raises(RunFolderError, match="taken over"):
        first.check()


def test_an_owner_raises_no_counter_but_its_own(tmp_path: Path, make: Callable[..., RunLock]) -> None:
    run_lock = make(seconds=LONG)
    run_lock.acquire()
    others = lock(tmp_path, counter="of another").read_text()
    run_lock._raise_counter()
    assert newest(tmp_path).read_text() == others
    with pytest.raises(RunFolderError, match="removed or damaged"):
        run_lock.check()


def test_of_many_threads_that_found_a_lock_dead_exactly_one_takes_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_contenders = 8
    all_have_judged = threading.Barrier(num_contenders, timeout=120)
    claim = RunLock._claim

    def claim_together(self: RunLock, number: int) -> bool:
        if number == 2:
            all_have_judged.wait()
        return claim(self, number)

    def contend(folder: Path) -> RunLock | None:
        run_lock = RunLock(folder, job=None, restart=0, fence_seconds=LONG, wait=refuse)
        try:
            assert run_lock.acquire() is True
        except WaitsError:
            return None
        return run_lock

    monkeypatch.setattr(RunLock, "_claim", claim_together)
    with ThreadPoolExecutor(num_contenders) as threads:
        for attempt in range(20):
            folder = tmp_path / str(attempt)
            folder.mkdir()
            lock_of_the_dead(folder)
            winners = [run_lock for run_lock in threads.map(contend, [folder] * num_contenders) if run_lock is not None]
            assert len(winners) == 1
            winners[0].check()
            assert locks(folder) == ["fence-000002.json"]
            winners[0].release()


def test_of_many_processes_exactly_one_takes_over(tmp_path: Path, start: Callable[[], Job]) -> None:
    jobs = [start() for _ in range(6)]
    for attempt in range(20):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        lock_of_the_dead(folder)
        for job in jobs:
            job.tell("acquire", folder, LONG)
        said = [job.answer() for job in jobs]
        assert sorted(said) == ["True"] + ["waits"] * 5
        assert jobs[said.index("True")].do("check") == "None"
        assert locks(folder) == ["fence-000002.json"]


def test_a_contender_that_judged_long_ago_does_not_win_a_number_that_is_free_again(
    tmp_path: Path, make: Callable[..., RunLock], monkeypatch: pytest.MonkeyPatch
) -> None:
    lock_of_the_dead(tmp_path)
    late = make(seconds=LONG)
    claim = late._claim
    owners: list[RunLock] = []

    def claim_late(number: int) -> bool:
        for restart in (0, 1):
            owners.append(make(job="7", restart=restart, seconds=LONG))
            assert owners[-1].acquire() is True
        assert locks(tmp_path) == ["fence-000003.json"]
        return claim(number)

    monkeypatch.setattr(late, "_claim", claim_late)
    with pytest.raises(WaitsError, match=r"job 7 \(restart 1\)"):
        late.acquire()
    owners[1].check()
    with pytest.raises(RunFolderError, match=r"taken over by job 7 \(restart 1\)"):
        owners[0].check()
    owners[1].release()
    assert make(seconds=LONG).acquire() is False


def test_a_creation_whose_answer_was_lost_is_a_creation(
    tmp_path: Path, make: Callable[..., RunLock], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_lock = make(seconds=LONG)
    create = Path.open

    def create_twice(self: Path, mode: str = "r") -> Any:
        if mode == "xb":
            with create(self, mode) as file:
                file.write(run_lock._content())
        return create(self, mode)

    monkeypatch.setattr(Path, "open", create_twice)
    assert run_lock.acquire() is False
    run_lock.check()


def test_the_counter_survives_a_disk_that_fails_for_a_while(
    tmp_path: Path, make: Callable[..., RunLock], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_lock = make(seconds=0.1)
    failed, went_on = threading.Event(), threading.Event()
    opened = Path.open

    def failing(self: Path, mode: str = "r") -> Any:
        if mode == "r+b" and not failed.is_set():
            failed.set()
            raise OSError(errno.EIO, "Input/output error")
        if mode == "r+b":
            went_on.set()
        return opened(self, mode)

    monkeypatch.setattr(Path, "open", failing)
    run_lock.acquire()
    assert failed.wait(10)
    assert went_on.wait(10)
    run_lock.check()


def test_a_look_that_fails_once_is_repeated(
    tmp_path: Path, make: Callable[..., RunLock], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_lock = make(seconds=SHORT)
    run_lock.acquire()
    answers = [OSError(errno.ESTALE, "Stale file handle"), OSError(errno.ESTALE, "Stale file handle")]
    read = Path.read_bytes

    def stale(self: Path) -> bytes:
        if answers:
            raise answers.pop()
        return read(self)

    monkeypatch.setattr(Path, "read_bytes", stale)
    run_lock.check()
    answers += [OSError(errno.ESTALE, "Stale file handle") for _ in range(3)]
    with pytest.raises(RunFolderError, match=rf"{tmp_path} cannot be read \(Stale file handle\)"):
        run_lock.check()


def test_a_folder_that_cannot_be_written_is_named(
    tmp_path: Path, make: Callable[..., RunLock], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match=rf"run folder {tmp_path}/file/run cannot be locked: Not a directory"):
        RunLock(tmp_path / "file" / "run", job=None, restart=0, wait=refuse).acquire()

    def read_only(self: Path, mode: str) -> Any:
        raise OSError(errno.EROFS, "Read-only file system")

    run_lock = make()
    monkeypatch.setattr(Path, "open", read_only)
    with pytest.raises(RunFolderError, match=rf"run folder {tmp_path} cannot be locked: Read-only file system"):
        run_lock.acquire()


def test_a_lock_is_always_as_long_and_whole_also_half_overwritten(tmp_path: Path, make: Callable[..., RunLock]) -> None:
    run_lock = make()
    before, run_lock._counter = run_lock._content(), 99_999
    after = run_lock._content(released=True)
    assert len(before) == len(after)
    for cut in range(len(before)):
        assert json.loads(after[:cut] + before[cut:])["token"] == run_lock._own.token


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (None, 0)),
        ({"SLURM_JOB_ID": "71", "TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_RESTART_COUNT": "4"}, ("71", 0)),
        ({"SLURM_JOB_ID": "71", "SLURM_RESTART_COUNT": "2"}, ("71", 2)),
        ({"TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_RESTART_COUNT": "4"}, ("x", 4)),
        ({"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "4"}, (None, 0)),
    ],
)
def test_a_job_is_known_by_what_started_it(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: tuple[str | None, int]
) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    job = own_job()
    assert ((job.job, job.restart) if job is not None else (None, 0)) == expected


def test_the_lock_of_a_run_names_the_job_that_a_scheduler_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "71")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    train(configuration(tmp_path, limit={"steps": 1}))
    (lock,) = tmp_path.glob("fence-*.json")
    written = json.loads(lock.read_text())
    assert (written["job"], written["restart"]) == ("71", 2)
