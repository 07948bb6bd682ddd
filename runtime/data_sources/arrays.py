"""NumPy arrays: ``.npy`` files and members of ``.npz`` files, memory-mapped."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from runtime.errors import DataError
from runtime.files import digest, existing, rows_within
from runtime.wording import did_you_mean

_LOCAL_HEADER = struct.Struct("<26x2H")  # of a zip member; its last two fields are the lengths of name and extra field


class Arrays(Dataset[dict[str, Tensor]]):
    """Samples from NumPy arrays whose first axis is samples.

    ``.npy`` files and the members of ``.npz`` files written by ``np.savez`` are memory-mapped: they may be larger than
    memory, and all processes of a machine share them. Members of compressed ``.npz`` files are read into memory.

    Args:
        parts: mapping from the name of a part to ``file.npy`` or ``file.npz:member``; or one ``.npz`` file, all of whose
            members are parts with the same names.
        floating: dtype that floating-point parts are cast to; null leaves them unchanged. Integers become int64, except
            for uint8 (images), and booleans stay.
        provided_by: command that installs the files, for the error message if they are missing.

    A sample is a mapping, such as ``{inputs, target}``; ``data.fields`` assigns the roles of its parts.

    Raises:
        DataError: a file or member is missing, holds Python objects, or the arrays differ in length.
    """

    deterministic = True
    shared_arguments = ("floating",)
    """Arguments that data to predict takes over from the training data."""

    def __init__(
        self, parts: str | Mapping[str, str], *, floating: str | None = "float32", provided_by: str | None = None
    ) -> None:
        self._floating = None if floating is None else _floating_type(floating)
        if isinstance(parts, str):
            path = existing(parts, provided_by=provided_by)
            with _opened(path) as archive:
                parts = {
                    name.removesuffix(".npy"): f"{path}:{name.removesuffix('.npy')}" for name in archive.namelist()
                }
        if not parts:
            raise DataError("Arrays: 'parts' names no array")
        self._places = {name: _place(place, provided_by) for name, place in parts.items()}
        self._arrays = self._open()
        lengths = {name: len(array) if array.ndim else 0 for name, array in self._arrays.items()}
        if len(set(lengths.values())) > 1:
            raise DataError(
                f"the arrays differ in length: {', '.join(f'{n} has {size}' for n, size in lengths.items())}"
            )
        self._size = next(iter(lengths.values()))
        members = {name: member for name, (_, member) in self._places.items()}
        self.fingerprint = f"arrays {digest(*dict.fromkeys(path for path, _ in self._places.values()))} {members}"

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return the parts of one sample."""
        return {name: part[0] for name, part in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """Return a finished batch: each part (len(indices), …)."""
        rows = rows_within(indices, self._size)
        return {name: self._tensor(array[rows]) for name, array in self._arrays.items()}

    def column(self, name: str) -> NDArray[Any]:
        """Return a whole part, memory-mapped."""
        if name not in self._arrays:
            raise DataError(f"there is no array {name!r}{did_you_mean(name, self._arrays)}")
        return self._arrays[name]

    def __getstate__(self) -> dict[str, Any]:
        """Omit the arrays: a loader worker maps the files again."""
        return {name: value for name, value in self.__dict__.items() if name != "_arrays"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore everything else and map the files."""
        self.__dict__.update(state)
        self._arrays = self._open()

    def _open(self) -> dict[str, NDArray[Any]]:
        return {name: _mapped(path, member) for name, (path, member) in self._places.items()}

    def _tensor(self, values: NDArray[Any]) -> Tensor:
        if values.dtype.kind == "f":
            return torch.from_numpy(values.astype(self._floating or values.dtype, copy=False))
        if values.dtype.kind in "iu" and values.dtype != np.uint8:
            return torch.from_numpy(values.astype(np.int64))
        return torch.from_numpy(values)


def _floating_type(name: str) -> np.dtype[Any]:
    if name not in ("float16", "float32", "float64"):
        raise DataError(f"floating={name!r}: use float16, float32, float64 or null")
    return np.dtype(name)


def _place(place: str, provided_by: str | None) -> tuple[Path, str | None]:
    file, _, member = place.partition(".npz:")
    if member:
        return existing(f"{file}.npz", provided_by=provided_by), member
    path = existing(place, provided_by=provided_by)
    if path.suffix == ".npz":
        raise DataError(f"name a member of {path}, as in '{place}:NAME'")
    return path, None


def _opened(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise DataError(f"{path} is not an .npz file ({error})") from error


def _mapped(path: Path, member: str | None) -> NDArray[Any]:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False) if member is None else _member(path, member)
    except (ValueError, EOFError) as error:
        raise DataError(f"{path} cannot be read as an array of numbers: {error}") from error
    if array.dtype.kind not in "fiub":
        raise DataError(f"{path} holds {array.dtype}, not numbers")
    # In native byte order, and as a plain array over the map: indexing the memmap subclass is slower.
    return np.asarray(array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("=")))


def _member(path: Path, member: str) -> NDArray[Any]:
    with _opened(path) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        if member not in names:
            raise DataError(f"{path} has no member {member!r}{did_you_mean(member, names)}; it has {', '.join(names)}")
        info = archive.getinfo(f"{member}.npy")
        with archive.open(info) as file:
            if info.compress_type != zipfile.ZIP_STORED:
                array: NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
                return array
            version = np.lib.format.read_magic(file)
            read_header = (
                np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            )
            shape, fortran_order, dtype = read_header(file)
            header_bytes = file.tell()
    with path.open("rb") as file:
        file.seek(info.header_offset)
        name_bytes, extra_bytes = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    if dtype.hasobject:
        raise ValueError("Object arrays cannot be loaded when allow_pickle=False")
    offset = info.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes + header_bytes
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape, order="F" if fortran_order else "C")
