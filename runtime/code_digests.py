"""The user's modules as digests of their files: what a run was trained with, and what has changed since.

The modules are those that were imported from the ``code`` folder, packages within it included, and those of packages that
targets name and that are installed from a folder elsewhere (``pip install -e``). Installed packages count by version.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from hashlib import sha256
from importlib import metadata
from importlib.machinery import all_suffixes
from pathlib import Path
from typing import Any

from runtime.errors import CheckpointError

_SUFFIXES = tuple(all_suffixes())  # of sources, of compiled sources without them, of extensions in C
_OURS = ("runtime", "launch")
_INSTALLED = f"{os.sep}site-packages{os.sep}"
_first_seen: dict[str, str] = {}


def loaded_code(folder: Path, configuration: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Return digests of the user's imported files, by path (relative to ``folder`` if within), and versions of packages.

    A file's digest is the one that it had when it was first asked for: it may be edited while a run goes on.

    Args:
        folder: the code folder.
        configuration: resolved values, whose targets name packages.
    """
    within = str(folder.resolve()) + os.sep
    tops = {target.partition(":")[0].partition(".")[0] for target in _targets(configuration) if ":" in target}
    files, packages = {}, {}
    for name, module in list(sys.modules.items()):  # thousands, at each save
        top = name.partition(".")[0]
        file = getattr(module, "__file__", None)
        path = _source(file) if isinstance(file, str) else None
        if path is None or top in _OURS:
            continue
        if path.startswith(within) and _INSTALLED not in path[len(within) - 1 :]:
            files[Path(path[len(within) :]).as_posix()] = _digest(path)
        elif top in tops and _INSTALLED not in path and not path.startswith(sys.base_prefix + os.sep):
            files[path] = _digest(path)
        elif name in tops:
            packages[name] = _version(name, module)
    return {"files": dict(sorted(files.items())), "packages": dict(sorted(packages.items()))}


def changes_of(stored: Mapping[str, Mapping[str, str]], folder: Path, configuration: Mapping[str, Any]) -> list[str]:
    """Return what of a run's code has changed: its files by name, packages with both versions."""
    now, changed = loaded_code(folder, configuration), []
    for name, digest in stored["files"].items():
        path = folder.resolve() / name  # an absolute name replaces the folder
        if not path.is_file():
            changed.append(f"{name} is gone")
        elif now["files"].get(name, _digest(str(path))) != digest:
            changed.append(f"{name} has changed")
    changed += [f"{name} is new" for name in now["files"] if name not in stored["files"]]
    for name, version in stored["packages"].items():
        if name in now["packages"] and now["packages"][name] != version:
            changed.append(f"{name} was {version}, is {now['packages'][name]}")
    return changed


def _targets(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if key == "target" and isinstance(inner, str):
                yield inner
            else:
                yield from _targets(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _targets(inner)


@cache
def _source(file: str) -> str | None:
    """Return a module's file, by the real path of its folder; torch gives some of its modules files that are none."""
    if not file.endswith(_SUFFIXES) or not Path(file).is_absolute():
        return None
    return str(_real(Path(file).parent) / Path(file).name)


@cache
def _real(folder: Path) -> Path:
    return folder.resolve()


def _digest(path: str) -> str:
    if path not in _first_seen:
        try:
            _first_seen[path] = sha256(Path(path).read_bytes()).hexdigest()[:16]
        except OSError:
            return "unreadable"
    return _first_seen[path]


def _version(name: str, module: Any) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return str(getattr(module, "__version__", "unknown"))


def warning_of(changes: Sequence[str], *, finished: bool) -> str:
    """Return the warning for a run whose code has changed since its checkpoint, which may have been its last."""
    if finished:
        return (
            f"the code is not what this run was trained with: {_listed(changes)}. Its results are those of the code before; "
            "to train with the new code, choose another output"
        )
    return f"the code has changed since the checkpoint: {_listed(changes)}. From here on the new code is trained"


@contextmanager
def explained_by(changes: Sequence[str]) -> Iterator[None]:
    """Add to the message of a checkpoint that does not fit what has changed in the code since: the likely reason."""
    try:
        yield
    except CheckpointError as error:
        if not changes:
            raise
        raise CheckpointError(f"{error}\n  The code has changed since the checkpoint: {_listed(changes)}") from error


def _listed(changes: Sequence[str]) -> str:
    return ", ".join(changes[:8]) + (", …" if len(changes) > 8 else "")
