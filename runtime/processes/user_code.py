"""The user's modules as digests of their files: what a run was trained with, and what has changed since.

The modules are those that were imported from the ``code`` folder, packages within it included, and those of packages that
targets name and that are installed from a folder elsewhere (``pip install -e``). Installed packages count by version.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import Any

_OURS = ("runtime", "launch")
_first_seen: dict[Path, str] = {}


def loaded_code(folder: Path, configuration: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Return digests of the user's imported files, by path (relative to ``folder`` if within), and versions of packages.

    A file's digest is the one that it had when it was first asked for: it may be edited while a run goes on.

    Args:
        folder: the code folder.
        configuration: resolved values, whose targets name packages.
    """
    folder = folder.resolve()
    tops = {target.partition(":")[0].partition(".")[0] for target in _targets(configuration) if ":" in target}
    files, packages = {}, {}
    for name, module in list(sys.modules.items()):
        top = name.partition(".")[0]
        path = _source(module)
        if path is None or top in _OURS:
            continue
        if path.is_relative_to(folder) and "site-packages" not in path.relative_to(folder).parts:
            files[path.relative_to(folder).as_posix()] = _digest(path)
        elif top in tops and "site-packages" not in path.parts and not path.is_relative_to(sys.base_prefix):
            files[str(path)] = _digest(path)
        elif name in tops:
            packages[name] = _version(name, module)
    return {"files": dict(sorted(files.items())), "packages": dict(sorted(packages.items()))}


def changes_of(stored: Mapping[str, Mapping[str, str]], folder: Path, configuration: Mapping[str, Any]) -> list[str]:
    """Return what of a run's code is another now: its files by name, packages with both versions."""
    now, changed = loaded_code(folder, configuration), []
    for name, digest in stored["files"].items():
        path = folder.resolve() / name  # which an absolute name replaces
        if not path.is_file():
            changed.append(f"{name} is gone")
        elif now["files"].get(name, _digest(path)) != digest:
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


def _source(module: Any) -> Path | None:
    file = getattr(module, "__file__", None)
    if (
        not isinstance(file, str) or not file.endswith(".py") or not Path(file).is_absolute()
    ):  # torch names some otherwise
        return None
    return Path(file).resolve()


def _digest(path: Path) -> str:
    if path not in _first_seen:
        try:
            _first_seen[path] = sha256(path.read_bytes()).hexdigest()[:16]
        except OSError:
            return "unreadable"
    return _first_seen[path]


def _version(name: str, module: Any) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return str(getattr(module, "__version__", "unknown"))


def told_changes(changes: Sequence[str], *, finished: bool) -> str:
    """Return the line for a run whose code has changed since its checkpoint, which may have been its last."""
    listed = ", ".join(changes[:8]) + (", …" if len(changes) > 8 else "")
    if finished:
        return (
            f"the code is not what this run was trained with: {listed}. Its results are those of the code before; "
            "to train with the new code, choose another output"
        )
    return f"the code has changed since the checkpoint: {listed}. From here on the new code is trained"
