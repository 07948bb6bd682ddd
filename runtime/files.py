"""Files of the user's and of installed packages: found, or missed in one message; and what identifies their content."""

from __future__ import annotations

import importlib.machinery
import sys
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from runtime.environment import data_folder
from runtime.errors import DataError
from runtime.wording import did_you_mean

PACKAGE = "package:"
_BLOCK_BYTES = 1 << 16
_BLOCKS = 64


def existing(path: str | Path, *, folder: bool = False, provided_by: str | None = None) -> Path:
    """Return the path of a file (or folder) that is there; ``~`` is the home folder.

    Args:
        path: ``package:NAME/inside/it`` lies in an installed package, which is not imported. What is missing is looked for in
            the folder that the environment variable ``LOCKSTEP_DATA`` names, too: a package put there by ``pip install
            --target``, or the whole path, as ``dpkg -x`` unpacks it.
        provided_by: the command that brings the file, for the message.

    Raises:
        DataError: it is missing; names the nearest name beside it, or the first folder that is missing.
    """
    name = str(path)
    if name.startswith(PACKAGE):
        return _in_package(name.removeprefix(PACKAGE), folder=folder, provided_by=provided_by)
    wanted = Path(path).expanduser()
    elsewhere = data_folder()
    places: list[Path] = [wanted, *([elsewhere / name.lstrip("/")] if elsewhere else [])]
    for place in places:
        if place.is_dir() if folder else place.is_file():
            return place
    kind = "folder" if folder else "file"
    if wanted.exists():
        what = f"{wanted} is a {'file' if folder else 'folder'}, and a {kind} is needed"
    else:
        parent = wanted.parent
        while not parent.is_dir() and parent != parent.parent:
            parent = parent.parent
        what = f"there is no {kind} {wanted}"
        missing = wanted.relative_to(parent).parts[0]
        what += did_you_mean(missing, [found.name for found in parent.iterdir()], within=str(parent / "{}"))
        if parent != wanted.parent:
            what += f" (there is no folder {parent / missing})"
        elif not wanted.is_absolute():
            what += f" (relative to {Path.cwd()})"
    raise DataError(what + (f"; to get it: {provided_by}" if provided_by else ""))


def existing_folder(path: str, *, provided_by: str | None = None) -> str:
    """Return the path of a folder as text: for arguments of others' functions, such as ``from_pretrained``."""
    return str(existing(path, folder=True, provided_by=provided_by))


def _in_package(name: str, *, folder: bool, provided_by: str | None) -> Path:
    package, _, inside = name.partition("/")
    elsewhere = data_folder()
    found = False
    for place in [*sys.path, *([str(elsewhere)] if elsewhere else ())]:
        # Found, not imported: packages that come with data often need others which nobody has installed.
        spec = importlib.machinery.PathFinder.find_spec(package, [place])
        for location in (spec.submodule_search_locations or ()) if spec else ():
            found = True
            wanted = Path(location) / inside
            if wanted.is_dir() if folder else wanted.is_file():
                return wanted
    cure = f": {provided_by}" if provided_by else ""
    if found:
        raise DataError(f"the package {package!r} is installed, but without {inside}; another version has it{cure}")
    raise DataError(f"the package {package!r}, which has {inside or 'the data'}, is not installed{cure}")


def digest(*paths: Path) -> str:
    """Return what identifies the content of files: of large ones size and 64 blocks of 64 KiB, of others every byte.

    So it takes milliseconds for a file larger than memory; a change between the blocks goes unseen.
    """
    hashed = blake2b(digest_size=16)
    for path in paths:
        size = path.stat().st_size
        hashed.update(f"{path.name}:{size}:".encode())
        with path.open("rb") as file:
            if size <= _BLOCKS * _BLOCK_BYTES:
                hashed.update(file.read())
                continue
            for start in np.linspace(0, size - _BLOCK_BYTES, _BLOCKS).astype(int).tolist():
                file.seek(start)
                hashed.update(file.read(_BLOCK_BYTES))
    return hashed.hexdigest()


def rows_within(indices: Any, size: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return indices as an array: (n,) int64.

    Raises:
        IndexError: one lies outside [0, size); negative indices are not supported.
    """
    rows = np.asarray(indices, dtype=np.int64)
    if rows.size and not (rows.min() >= 0 and rows.max() < size):
        raise IndexError(f"indices must lie between 0 and {size - 1}")
    return rows
