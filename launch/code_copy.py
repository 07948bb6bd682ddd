"""A copy of what is submitted, beside the run: a job that waits in a queue for days runs the code of the day it was submitted.

git says which files belong to the code: those it tracks and those it would, but not what it ignores. Where there is no git,
the Python files do. Data does not belong here, hence the limit.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from runtime.config.locations import Locations
from runtime.wording import in_units

_MAX_BYTES = 100 << 20
_MAX_DIFF_BYTES = 1 << 20
_NOT_CODE = ("runs", "wandb", "build", "dist", "node_modules", "__pycache__", "venv", "site-packages")


@dataclass(frozen=True)
class Revision:
    """Which state of a git repository the code is.

    Args:
        commit: the one checked out; None without git.
        changes: what is not committed, as git tells it, of at most 1 MiB.
        cut: whether it was more.
    """

    commit: str | None
    changes: bytes
    cut: bool


def snapshot(code: Path, folder: Path, where: Locations) -> None:
    """Copy a run's code folder.

    Args:
        folder: where to; must not be there yet.
        where: where each key of the configuration was written.

    Raises:
        ConfigurationError: it holds so much that it must be more than code.
    """
    files = list(code_files(code))
    sizes = {path: (code / path).stat().st_size for path in files}
    if (total := sum(sizes.values())) > _MAX_BYTES:
        largest = max(sizes, key=lambda path: sizes[path])
        what = (
            f"the folder of the run's code ({code}) holds {in_units(total)}, most in {largest}, and would be copied: put "
            "data into .gitignore, or name a folder of code alone"
        )
        raise where.error(("code",), what)
    folder.mkdir(parents=True)
    for path in files:
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(code / path, target)  # what a link points to: it could point elsewhere by then


def code_files(folder: Path) -> Iterator[Path]:
    """Yield the files of a folder that are code, relative to it."""
    listed = _git(folder, "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--deduplicate", "--", ".")
    if listed is None:
        yield from _python_files(folder, Path())
        return
    for name in filter(None, listed.split(b"\0")):
        path = Path(name.decode(errors="surrogateescape"))
        if (folder / path).is_dir():  # a submodule, or another repository
            yield from (path / inner for inner in code_files(folder / path))
        elif (folder / path).is_file():  # and not deleted since
            yield path


def revision(folder: Path) -> Revision:
    """Return which commit a folder is at, and what in it is not committed."""
    commit = _git(folder, "rev-parse", "HEAD")
    changes = (_git(folder, "diff", "HEAD", "--", ".") or b"") if commit is not None else b""
    return Revision(
        commit.decode().strip() if commit is not None else None,
        changes[:_MAX_DIFF_BYTES],
        len(changes) > _MAX_DIFF_BYTES,
    )


def _python_files(folder: Path, inside: Path) -> Iterator[Path]:
    for path in sorted((folder / inside).iterdir()):
        if path.is_dir() and not path.is_symlink() and path.name not in _NOT_CODE and not path.name.startswith("."):
            yield from _python_files(folder, inside / path.name)
        elif path.suffix == ".py" and path.is_file():
            yield inside / path.name


def _git(folder: Path, *words: str) -> bytes | None:
    """Return what git says of a folder; None if there is no git, or it does not want to."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
