"""Python source code as bytes: language model data that is available on every machine."""

from __future__ import annotations

import hashlib
import os
import secrets
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from runtime.data_sources.token_chunks import Chunks
from runtime.errors import DataError

END_OF_DOCUMENT = 256  # the token after the 256 byte values
VOCAB_SIZE = 257

# Not part of the library, or its tests: as much text again, much of it tables of literals.
EXCLUDED_FOLDERS = frozenset(
    {
        "__pycache__",
        "dist-packages",
        "idle_test",
        "idlelib",
        "lib2to3",
        "site-packages",
        "test",
        "tests",
    }
)

_LAYOUT = "1"  # part of a token file's name; raise it when what is written changes
_TOKEN = np.dtype("<u2")


class SourceCode(Dataset[tuple[Tensor, Tensor]]):
    """Next-token prediction over the Python files of a folder, one byte per token.

    A document is one file: its bytes between two end-of-document tokens. It is split into chunks
    of ``context_length`` inputs, each with the token that follows it as its target; consecutive
    chunks share one token, the last target of one and the first input of the next. So over an
    epoch every byte of a document, and its end, is a target exactly once, and no chunk reaches
    into another document. A document's last chunk is shorter: inputs are padded with the
    end-of-document token, targets with -100, so samples differ in their number of targets.

    Whole documents are assigned to a split by a hash of their content, so equal files are in the
    same split.

    The tokens of both splits are in one memory-mapped file, whose pages all processes of a machine
    share. It is named by its content and moved into place when complete, so any number of
    processes may build it at once. The constructor reads every source file to determine that name:
    tens of milliseconds for the standard library once the files are in memory.

    Args:
        split: ``"train"`` or ``"validation"``.
        context_length: tokens of a sample.
        validation_fraction: expected fraction of the documents held out, above 0 and below 1.
        seed: key of the hash that selects held-out documents; must be the same for both splits.
        folder: searched for ``*.py`` files, at any depth; by default Python's standard library.
            Folders named in ``EXCLUDED_FOLDERS`` and empty files are skipped.
        cache: folder of the token file, created if missing; by default ``lockstep`` under
            ``$XDG_CACHE_HOME`` or ``~/.cache``.

    Raises:
        DataError: an argument is out of range, the folder is missing or holds no source, no
            document is in the split, or the token file cannot be written.
    """

    deterministic = True

    def __init__(
        self,
        split: str,
        *,
        context_length: int,
        validation_fraction: float = 0.05,
        seed: int = 0,
        folder: str | Path | None = None,
        cache: str | Path | None = None,
    ) -> None:
        if split not in ("train", "validation"):
            raise DataError(f"split {split!r} is unknown: use 'train' or 'validation'")
        if context_length < 1:
            raise DataError(f"context_length={context_length}: it must be at least 1")
        if not 0.0 < validation_fraction < 1.0:
            raise DataError(f"validation_fraction={validation_fraction}: it must lie between 0 and 1")
        source = Path(sysconfig.get_paths()["stdlib"] if folder is None else folder).expanduser()
        documents = list(_documents(source))
        if not documents:
            raise DataError(f"folder {source} holds no Python source")

        digest = hashlib.sha256(b"".join(document.digest for document in documents)).hexdigest()
        name = f"source-code-{_LAYOUT}-{digest[:32]}.tokens"
        self.context_length = context_length
        self.fingerprint = (
            f"{name} split={split} context_length={context_length} "
            f"validation_fraction={validation_fraction} seed={seed}"
        )
        self._path = (_default_cache() if cache is None else Path(cache).expanduser()) / name
        _ensure_token_file(self._path, documents)
        self._tokens = self._open()

        starts, ends = _bounds(documents, split, validation_fraction, seed)
        self._chunks = Chunks(starts, ends, context_length)

    def __len__(self) -> int:
        """Return the number of chunks in this split."""
        return len(self._chunks)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of one chunk, each (context_length,) int64.

        Raises:
            IndexError: there is no such chunk; negative indices are not supported.
        """
        inputs, targets = self.__getitems__([index])
        return inputs[0], targets[0]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Return a finished batch: inputs and targets, each (len(indices), context_length) int64.

        Raises:
            IndexError: there is no such chunk; negative indices are not supported.
        """
        return self._chunks.read(self._tokens, indices)

    def __getstate__(self) -> dict[str, Any]:
        """Omit the tokens: a loader worker maps the file again."""
        return {name: value for name, value in self.__dict__.items() if name != "_tokens"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore everything else and map the token file."""
        self.__dict__.update(state)
        self._tokens = self._open()

    def _open(self) -> NDArray[np.uint16]:
        # As a plain array over the map: indexing the memmap subclass is slower. The map closes with it.
        return np.asarray(np.memmap(self._path, dtype=_TOKEN, mode="r"))


@dataclass(frozen=True)
class _Document:
    path: Path
    num_bytes: int
    digest: bytes


def _documents(folder: Path) -> Iterator[_Document]:
    """Yield the Python files under ``folder`` that are not empty, ordered by relative path."""
    if not folder.is_dir():
        raise DataError(f"folder {folder} does not exist or is not a folder")
    paths: list[Path] = []
    for parent, folders, files in os.walk(folder):
        # Assigned in place, so that ``os.walk`` skips the excluded folders.
        folders[:] = [name for name in folders if name not in EXCLUDED_FOLDERS]
        paths += [Path(parent, name) for name in files if name.endswith(".py")]
    for path in sorted(paths, key=lambda path: path.relative_to(folder).as_posix()):
        # A distribution may contain a link to a file that it does not install.
        content = path.read_bytes() if path.is_file() else b""
        if content:
            yield _Document(path, len(content), hashlib.sha256(content).digest())


def _bounds(
    documents: list[_Document], split: str, validation_fraction: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return start and end positions of a split's documents, both positions of end-of-document tokens."""
    ends = np.cumsum([document.num_bytes + 1 for document in documents], dtype=np.int64)
    starts = np.concatenate([[0], ends[:-1]])
    # A keyed hash of the content, used as a uniform draw from 0 to 1.
    draws = [hashlib.sha256(f"{seed}:".encode() + document.digest).digest() for document in documents]
    held_out = np.array([int.from_bytes(draw[:7]) < validation_fraction * 2**56 for draw in draws])
    selected = held_out if split == "validation" else ~held_out
    if not selected.any():
        raise DataError(
            f"none of {len(documents)} documents is in the {split} split: change validation_fraction or seed"
        )
    return starts[selected], ends[selected]


def _default_cache() -> Path:
    """Return the cache folder of the XDG base directory specification, version 0.8."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lockstep"


def _ensure_token_file(path: Path, documents: list[_Document]) -> None:
    """Write the token file of ``documents`` unless it exists.

    Every process that finds none writes a complete one under a unique name; the last to move it
    into place wins, and all of them are equal. A file left by a killed process has a name that no
    process reads.
    """
    num_tokens = 1 + sum(document.num_bytes + 1 for document in documents)
    if path.is_file() and path.stat().st_size == num_tokens * _TOKEN.itemsize:
        return
    partial = path.with_suffix(f".partial-{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            _write_tokens(partial, documents)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(
            f"cannot write the token file in {path.parent} ({error}): give another folder as cache"
        ) from error


def _write_tokens(path: Path, documents: list[_Document]) -> None:
    """Write an end-of-document token, then each document followed by another one; fsync the file."""
    end = np.array([END_OF_DOCUMENT], dtype=_TOKEN).tobytes()
    with path.open("xb") as file:
        file.write(end)
        for document in documents:
            content = document.path.read_bytes()
            if hashlib.sha256(content).digest() != document.digest:
                raise DataError(f"{document.path} changed while it was read: run again")
            file.write(np.frombuffer(content, dtype=np.uint8).astype(_TOKEN).tobytes() + end)
        file.flush()
        os.fsync(file.fileno())
