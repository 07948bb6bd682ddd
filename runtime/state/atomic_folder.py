"""Files that are being written: hidden beside their target, renamed when they are whole, cleared away after a kill."""

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
    """Yield a new folder beside a file that is to be written; what killed processes left of earlier ones is removed.

    A folder, since some libraries make temporary files of their own beside the one they write.
    """
    _clear_left_behind(out)
    hidden = out.with_name(f"{_prefix(out)}{os.getpid()}")
    hidden.mkdir()
    try:
        yield hidden
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def put_in_place(written: Path, out: Path) -> None:
    """Give a whole and synced file its final name."""
    os.replace(written, out)
    sync_folder(out.parent)


def _clear_left_behind(out: Path) -> None:
    """Remove what killed processes of this host have left of the same file."""
    for path in out.parent.iterdir():
        owner = path.name.removeprefix(_prefix(out))
        if path.name != owner and owner.isdigit() and not _alive(int(owner)):
            shutil.rmtree(path, ignore_errors=True)


def _prefix(out: Path) -> str:
    return f".{out.name}.partial-{socket.gethostname()}-"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # another user's
    return pid != os.getpid()  # an earlier process of the same number, then
