"""Whether the launcher of this process still lives: a rank whose launcher was killed would train on, watched by nobody.

Kinds of launchers: ``lockstep train`` and the node launcher say which process they are (LOCKSTEP_LAUNCHER); those of other
libraries are known by the command line of the parent process. Whoever starts a process by hand, or from a shell that ends, is
none. Imports the standard library alone.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from runtime import environment

_LAUNCHERS = ("accelerate", "torchrun", "torch.distributed", "torch/distributed")


def launcher_ended() -> Callable[[], bool]:
    """Return what tells whether a launcher of this process has ended since, however that happened."""
    pids = [pid for pid in (environment.launcher(), _launching_parent()) if pid is not None]
    watched = [_ended(pid) for pid in pids]
    return lambda: any(ended() for ended in watched)


def _launching_parent() -> int | None:
    parent = os.getppid()
    with suppress(OSError):
        words = Path(f"/proc/{parent}/cmdline").read_bytes().decode(errors="replace").split("\0")
        # The interpreter, and what it runs: a path, or -m and a module. Arguments that follow belong to that.
        if any(name in word for word in words[:4] for name in _LAUNCHERS):
            return parent
    return None


def _ended(pid: int) -> Callable[[], bool]:
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return lambda: True
    except (OSError, AttributeError):  # an old kernel, or a sandbox that forbids it
        return lambda: not Path(f"/proc/{pid}").exists()
    return lambda: bool(select.select([descriptor], [], [], 0)[0])
