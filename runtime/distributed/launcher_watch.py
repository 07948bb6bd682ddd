"""Detect that the launcher of this process has ended: otherwise a rank whose launcher was killed would train on unsupervised.

``lockstep train`` and the node launcher pass their process id (LOCKSTEP_LAUNCHER); launchers of other libraries are recognised
by their command lines, among this process's ancestors. Shells and scripts are not launchers: they may end while the process
trains on. Imports only the standard library.
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
_MPIRUN_DAEMONS = ("mpiexec.hydra", "hydra_pmi_proxy", "orted", "prted")  # children of mpirun that start the ranks
_MODULES = (
    "accelerate.commands.launch",
    "accelerate.commands.accelerate_cli",
    "deepspeed.launcher.launch",
    "torch.distributed.launch",
    "torch.distributed.run",
)


def launcher_ended() -> Callable[[], bool]:
    """Return a predicate: whether a launcher of this process has ended since this call, for whatever reason."""
    own = environment.launcher()
    watched = [_ended(pid) for pid in (*_launching_ancestors(), *([own] if own is not None else []))]
    return lambda: any(ended() for ended in watched)


def _launching_ancestors() -> Iterator[int]:
    """Yield the ids of the parent, its parent and so on, while they are launchers (two for ``deepspeed`` and ``mpirun``)."""
    pid = os.getppid()
    with suppress(OSError):
        while _is_launcher(Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")):
            yield pid
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def _is_launcher(words: Sequence[str]) -> bool:
    """Return whether a command line is a launcher's; a launcher's name in the folders of a path does not count."""
    if "python" not in Path(words[0]).name:
        return Path(words[0]).name in (*_COMMANDS, *_MPIRUN_DAEMONS)
    # The script or module (after -m) that Python runs; later words are its arguments.
    positional = [word for before, word in pairwise(words) if not word.startswith("-") and before not in ("-X", "-W")]
    positional = positional[1:] if positional and positional[0].endswith("launch/agent.py") else positional
    name = positional[0] if positional else ""
    return Path(name).name in _COMMANDS or name.removesuffix(".py").replace("/", ".").endswith(_MODULES)


def _ended(pid: int) -> Callable[[], bool]:
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return lambda: True
    except (OSError, AttributeError):  # an old kernel, or forbidden in a sandbox
        return lambda: not Path(f"/proc/{pid}").exists()
    return lambda: bool(select.select([descriptor], [], [], 0)[0])
