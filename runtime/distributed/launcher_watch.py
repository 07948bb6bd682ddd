"""Whether the launcher of this process still lives: a rank whose launcher was killed would train on, watched by nobody.

Kinds of launchers: ``lockstep train`` and the node launcher say which process they are (LOCKSTEP_LAUNCHER); those of other
libraries are known by their command lines, among this process's ancestors. A shell or a script that starts a process is none:
it may end, and leave the process to train on. Imports the standard library alone.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

from runtime import environment

_COMMANDS = ("accelerate", "accelerate-launch", "torchrun", "deepspeed", "mpirun", "mpiexec", "orterun", "prterun")
_BENEATH_MPIRUN = ("mpiexec.hydra", "hydra_pmi_proxy", "orted", "prted")  # which start the ranks
_MODULES = (
    "accelerate.commands.launch",
    "accelerate.commands.accelerate_cli",
    "deepspeed.launcher.launch",
    "torch.distributed.launch",
    "torch.distributed.run",
)


def launcher_ended() -> Callable[[], bool]:
    """Return what tells whether a launcher of this process has ended since, however that happened."""
    own = environment.launcher()
    watched = [_ended(pid) for pid in (*_launching_ancestors(), *([own] if own is not None else []))]
    return lambda: any(ended() for ended in watched)


def _launching_ancestors() -> Iterator[int]:
    """Yield the parent, its parent and so on, as far as they are launchers: ``deepspeed`` and ``mpirun`` are two processes."""
    pid = os.getppid()
    with suppress(OSError):
        while _is_launcher(Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")):
            yield pid
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def _is_launcher(words: Sequence[str]) -> bool:
    """Tell by the words of a command line; what has a launcher's name within its path only is none."""
    if "python" not in Path(words[0]).name:
        return Path(words[0]).name in (*_COMMANDS, *_BENEATH_MPIRUN)
    # What Python runs: a path, or a module after -m. Arguments that follow are the script's own.
    run = [word for before, word in pairwise(words) if not word.startswith("-") and before not in ("-X", "-W")]
    run = run[1:] if run and run[0].endswith("launch/agent.py") else run
    name = run[0] if run else ""
    return Path(name).name in _COMMANDS or name.removesuffix(".py").replace("/", ".").endswith(_MODULES)


def _ended(pid: int) -> Callable[[], bool]:
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return lambda: True
    except (OSError, AttributeError):  # an old kernel, or a sandbox that forbids it
        return lambda: not Path(f"/proc/{pid}").exists()
    return lambda: bool(select.select([descriptor], [], [], 0)[0])
