"""Atomic file output: written in a hidden folder next to the target, renamed when complete, removed after a kill."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from runtime.state.durable_files import sync_folder


@contextmanager
def hidden_folder(out: Path) -> Iterator[Path]:
    """Yield a new hidden folder next to an output file; folders that killed processes left behind are removed.

    A folder, since some libraries create temporary files next to the file they write.
    """
    _remove_stale(out)
    hidden = out.with_name(f"{_prefix(out)}{os.getpid()}")
    hidden.mkdir()
    try:
        yield hidden
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def put_in_place(complete: Path, out: Path) -> None:
    """Rename a complete and synced file to its final name, durably."""
    os.replace(complete, out)
    sync_folder(out.parent)


def _remove_stale(out: Path) -> None:
    """Remove the hidden folders of this file that belong to dead processes of this host."""
    for path in out.parent.iterdir():
        pid = path.name.removeprefix(_prefix(out))
        if path.name != pid and pid.isdigit() and not _other_process_alive(int(pid)):
            shutil.rmtree(path, ignore_errors=True)


def _prefix(out: Path) -> str:
    return f".{out.name}.partial-{socket.gethostname()}-"


def _other_process_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # a process of another user
    return pid != os.getpid()  # this process has no folder yet: it belonged to an earlier one with the same PID
