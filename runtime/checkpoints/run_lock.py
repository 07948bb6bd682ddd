"""The run lock: of two jobs on one run folder only one writes checkpoints, also on NFS and Lustre, without flock.

Locks are numbered files, ``fence-000001.json``, ``fence-000002.json``, …; the highest number owns the folder. A job takes over
by creating the next number (O_EXCL), which succeeds for one contender only; no job overwrites or renames another's lock.
So a kill is harmless at any step, and no order of events makes two jobs owners:

* The highest lock is never removed, not even on release (it is marked as released), so numbers only grow. A process that was
  suspended after checking lock n, and finds n + 1 free because the owner of n + 2 removed it, detects n + 2 and backs off.
* An owner increments its counter in place, in the file that it has just opened and found to be its own. If it was suspended
  and replaced, it finds no file, or writes to an unlinked one. The counter also works on a full disk.
* Only between ``check()`` and the following rename can an owner be suspended, be replaced, and still add one checkpoint. That
  checkpoint is whole.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from runtime import json_files
from runtime.errors import RunFolderError

_NAME = re.compile(r"fence-(\d+)\.json")


@dataclass(frozen=True)
class _Owner:
    token: str
    job: str | None
    restart: int
    host: str
    machine: str | None  # boot id and pid namespace (a container has its own); None without /proc
    pid: int
    started: int | None  # in clock ticks since boot
    fence_seconds: float

    def __str__(self) -> str:
        job = "" if self.job is None else f"job {self.job} (restart {self.restart}), "
        return f"{job}process {self.pid} on host {self.host}"


@dataclass(frozen=True)
class _Lock:
    number: int
    content: bytes
    owner: _Owner | None  # None if the file is damaged, or not yet written
    released: bool


_NO_LOCK = _Lock(0, b"", None, released=True)


class RunLock:
    """The lock on one run folder. For rank 0; acquired once.

    Args:
        job, restart: the job's id, unchanged by a restart, and its restart count; None and 0 without a job.
        fence_seconds: another job's lock is taken over if its counter has not changed for this long, or for the other's own
            ``fence_seconds`` if longer. This job's counter is incremented every sixth of it.
        wait: called with a message once for each lock that is watched.
    """

    def __init__(
        self, folder: Path, *, job: str | None, restart: int, fence_seconds: float = 30.0, wait: Callable[[str], None]
    ) -> None:
        self._folder = folder
        self._wait = wait
        self._own = _own_identity(job, restart, fence_seconds)
        self._poll_seconds = min(0.1, fence_seconds / 30)
        self._number = self._counter = 0  # of our lock
        self._stop = threading.Event()
        self._heartbeat_thread = threading.Thread(target=self._heartbeat_loop, name="lockstep-fence", daemon=True)

    def acquire(self) -> bool:
        """Acquire the lock; return whether it was taken over from an owner that had not released it.

        Raises:
            RunFolderError: another job is writing there, or no lock can be written.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            taken_over = self._take()
        except OSError as error:
            raise RunFolderError(f"run folder {self._folder} cannot be locked: {error.strerror or error}") from error
        self._heartbeat_thread.start()
        return taken_over

    def check(self) -> None:
        """Verify that this process still owns the lock; call before each rename in the folder.

        Raises:
            RunFolderError: another job owns it, or that cannot be determined. This process must stop writing.
        """
        then = "this process stops writing"
        try:
            newest = self._look()
        except OSError as error:
            raise RunFolderError(f"the lock in {self._folder} cannot be read ({error.strerror}); {then}") from error
        if newest.number > self._number:
            raise RunFolderError(f"{self._folder} was taken over by {newest.owner or 'another job'}; {then}")
        if newest.owner != self._own:
            raise RunFolderError(f"the lock in {self._folder} was removed or damaged; {then}")

    def release(self) -> None:
        """Release the lock if this process owns it. Never raises: all data has been written."""
        self._stop.set()
        if self._heartbeat_thread.is_alive():
            self._heartbeat_thread.join()
            self._raise_counter(released=True)

    def _take(self) -> bool:
        watched, still, seen = _NO_LOCK, 0.0, 0.0
        while True:
            looked = time.monotonic()
            newest = self._look()
            patience, owner = self._patience(newest), newest.owner or "a job whose lock is damaged"
            if patience and (watched.number, watched.owner) != (newest.number, newest.owner):
                watched, still = newest, 0.0
                self._wait(f"{self._folder} is locked by {owner}; watching up to {patience:g} s whether it still runs")
            elif patience and watched.content != newest.content:
                what_to_do = "wait for it, stop it, or choose another output"
                raise RunFolderError(f"another job is writing to {self._folder}: {owner}; {what_to_do}")
            else:  # time in which this process was suspended or hung does not count: an outage stops the other's counter too
                still += min(looked - seen, self._own.fence_seconds / 15)
            seen = time.monotonic()
            if still >= patience and self._claim(newest.number + 1):
                return not newest.released
            self._stop.wait(self._poll_seconds)

    def _patience(self, lock: _Lock) -> float:
        """Return for how many seconds a lock's counter must not change before the lock may be taken over."""
        owner, own = lock.owner, self._own
        if lock.released or owner is None:
            return 0.0 if lock.released else own.fence_seconds
        earlier = owner.job is not None and owner.job == own.job and owner.restart < own.restart
        here = None not in (own.machine, owner.started) and (owner.host, owner.machine) == (own.host, own.machine)
        dead = here and _started(owner.pid) not in (None, owner.started)
        return 0.0 if earlier or dead else max(own.fence_seconds, owner.fence_seconds)

    def _claim(self, number: int) -> bool:
        with suppress(FileExistsError), self._path(number).open("xb") as file:
            file.write(self._content())
        # The file decides, not the call's result: NFS may lose the reply, and numbers below the highest may be free again.
        if self._look().owner != self._own:
            return False
        self._number = number
        for older in [other for other in self._numbers() if other < number]:
            with suppress(OSError):  # it no longer has an effect
                self._path(older).unlink()
        return True

    def _path(self, number: int) -> Path:
        return self._folder / f"fence-{number:06}.json"

    def _numbers(self) -> list[int]:
        return [int(match[1]) for path in self._folder.iterdir() if (match := _NAME.fullmatch(path.name))]

    def _look(self, tries: int = 3) -> _Lock:
        """Return the highest lock, number 0 if there is none. Reopening folder and file makes NFS ask its server."""
        try:
            number = max(self._numbers(), default=0)
            return _parse(number, self._path(number).read_bytes()) if number else _NO_LOCK
        except OSError:  # removed by a new owner since it was listed, or stale, as NFS calls it
            if tries == 1 or self._stop.wait(self._poll_seconds):
                raise
            return self._look(tries - 1)

    def _heartbeat_loop(self) -> None:
        while not self._stop.wait(self._own.fence_seconds / 6):
            self._raise_counter()

    def _raise_counter(self, *, released: bool = False) -> None:
        # No fsync: during a large checkpoint it could take minutes, and closing is enough for NFS. Errors are ignored: the disk
        # may recover, an unreleased lock only makes the next job wait, and check() decides.
        with suppress(OSError), self._path(self._number).open("r+b") as file:
            if _parse(self._number, file.read()).owner == self._own:
                self._counter += 1
                file.seek(0)
                file.write(self._content(released=released))

    def _content(self, *, released: bool = False) -> bytes:
        """Return this lock's text: constant length, so that it is valid JSON even if read while being overwritten."""
        values = {**asdict(self._own), "released": int(released), "counter": f"{self._counter:012}"}
        return json.dumps(values).encode()


def _parse(number: int, content: bytes) -> _Lock:
    try:
        values = json_files.parse(content)
        owner = _Owner(**{field.name: values[field.name] for field in fields(_Owner)})
        return _Lock(number, content, owner, bool(values["released"]))
    except (ValueError, LookupError, TypeError):
        return _Lock(number, content, owner=None, released=False)


def _own_identity(job: str | None, restart: int, fence_seconds: float) -> _Owner:
    token, host, pid, machine = secrets.token_hex(8), socket.gethostname(), os.getpid(), None
    with suppress(OSError):
        namespace = Path("/proc/self/ns/pid").stat().st_ino
        machine = f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {namespace}"
    return _Owner(token, job, restart, host, machine, pid, _started(pid), fence_seconds)


def _started(pid: int) -> int | None:
    """Return when a process started: -1 if it no longer exists, None if unknown."""
    try:
        os.kill(pid, 0)  # /proc may hide another user's process
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError as error:
        return -1 if isinstance(error, ProcessLookupError) else None
    zombie = stat[0] in "ZX" and int(stat[17]) <= 1  # and none of its threads is still in a system call
    return -1 if zombie else int(stat[19])
