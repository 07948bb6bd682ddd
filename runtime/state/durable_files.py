"""Durable file writes: a file under its final name is complete and synced to disk."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path
from typing import Any


def write_durably(path: Path, *parts: Any) -> tuple[int, str]:
    """Write buffers to a file and sync it; return its size in bytes and its SHA-256 as hex."""
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        for part in parts:
            file.write(part)
            digest.update(part)
            size += len(part)
        file.flush()
        os.fsync(file.fileno())
    return size, digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Sync a folder, which makes renames and new files in it durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Create a folder and its missing parents durably."""
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    sync_folder(path.parent)


def replace_file(path: Path, content: str | bytes) -> None:
    """Replace a file atomically and durably."""
    partial = path.with_name(
        f".{path.name}.{threading.get_native_id()}"
    )  # in the main thread, the native ID is the PID
    try:
        write_durably(partial, content.encode() if isinstance(content, str) else content)
        os.replace(partial, path)
        sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def checksum(path: Path) -> str:
    """Return a file's SHA-256 as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
