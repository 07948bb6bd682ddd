"""Copy the code of a submission into the run folder, so that a job that waits for days runs the code it was submitted with.

Copied are the files that git tracks or would add, without ignored ones; without git, the Python files. Data should not be
copied, hence the size limit.
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
    """State of the code's git repository.

    Args:
        commit: commit that is checked out; None without git.
        changes: ``git diff`` of uncommitted changes, at most 1 MiB.
        cut: whether ``changes`` was truncated.
    """

    commit: str | None
    changes: bytes
    cut: bool


def snapshot(code: Path, folder: Path, where: Locations) -> None:
    """Copy a run's code folder.

    Args:
        folder: target; must not exist yet.
        where: positions of the configuration's keys, for errors.

    Raises:
        ConfigurationError: the folder holds more than 100 MiB.
    """
    files = list(code_files(code))
    sizes = {path: (code / path).stat().st_size for path in files}
    if (total := sum(sizes.values())) > _MAX_BYTES:
        largest = max(sizes, key=lambda path: sizes[path])
        what = (
            f"the code folder ({code}) would be copied, but holds {in_units(total)}; its largest file is {largest}: put data "
            "into .gitignore, or name a folder that holds only code"
        )
        raise where.error(("code",), what)
    folder.mkdir(parents=True)
    for path in files:
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(code / path, target)  # follows links: their targets may change before the job starts


def code_files(folder: Path) -> Iterator[Path]:
    """Yield the code files of a folder, as relative paths."""
    listed = _git(folder, "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--deduplicate", "--", ".")
    if listed is None:
        yield from _python_files(folder, Path())
        return
    for name in filter(None, listed.split(b"\0")):
        path = Path(name.decode(errors="surrogateescape"))
        if (folder / path).is_dir():  # a submodule, or another repository
            yield from (path / inner for inner in code_files(folder / path))
        elif (folder / path).is_file():  # not deleted from the working tree
            yield path


def revision(folder: Path) -> Revision:
    """Return the commit and the uncommitted changes of a folder."""
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
    """Return git's output for a folder; None if git is missing or fails."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
