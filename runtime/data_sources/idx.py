"""IDX files, the format of MNIST and similar data sets, gzipped or not."""

from __future__ import annotations

import gzip
import zlib
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

_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_SPLITS = {"train": "train", "test": "t10k"}


class Idx(Dataset[dict[str, Tensor]]):
    """Images and labels in two IDX files (LeCun, Cortes and Burges, "The MNIST database", file formats).

    Files are memory-mapped; gzipped ones are read into memory.

    Args:
        folder: holds ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte`` and the two ``t10k`` files, optionally with
            ``.gz``, as for MNIST, Fashion-MNIST (``apt install dataset-fashion-mnist``, then
            ``/usr/share/datasets/fashion-mnist``) and the like.
        split: ``train`` or ``test`` of that folder.
        images: file of images, instead of folder and split.
        labels: file of labels.
        mean: subtracted from pixels, which are scaled to 0 to 1.
        std: divisor of the result.
        provided_by: command that installs the files, for the error message if they are missing.

    A sample is ``{inputs: (1, height, width) float32, target: int64 scalar}``.

    Raises:
        DataError: a file is missing or damaged, or the two differ in length.
    """

    deterministic = True
    shared_arguments = ("mean", "std")
    """Arguments that data to predict takes over from the training data."""

    def __init__(
        self,
        folder: str | None = None,
        split: str | None = None,
        *,
        images: str | None = None,
        labels: str | None = None,
        mean: float = 0.0,
        std: float = 1.0,
        provided_by: str | None = None,
    ) -> None:
        if (
            (folder is None) == (images is None)
            or (images is None) != (labels is None)
            or not ((folder is None) == (split is None))
        ):
            raise DataError("Idx: give 'folder' and 'split', or 'images' and 'labels'")
        if std <= 0:
            raise DataError(f"Idx: std={std} must be above 0")
        if folder is not None and split is not None:
            paths = _paths_in(existing(folder, folder=True, provided_by=provided_by), split, provided_by)
        else:
            paths = tuple(existing(path, provided_by=provided_by) for path in (images, labels) if path is not None)
        self._paths = paths
        self._mean, self._std = mean, std
        self._images, self._labels = self._open()
        if self._images.ndim != 3 or self._labels.ndim != 1 or len(self._images) != len(self._labels):
            raise DataError(
                f"{paths[0]} has shape {self._images.shape} and {paths[1]} {self._labels.shape}; they must have shapes "
                "(samples, height, width) and (samples,)"
            )
        self.fingerprint = f"idx {digest(*paths)} mean={mean} std={std}"

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return one image and its label."""
        return {name: part[0] for name, part in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """Return a finished batch: images (n, 1, height, width) float32, labels (n,) int64."""
        rows = rows_within(indices, len(self))
        pixels = torch.from_numpy(self._images[rows].astype(np.float32)).unsqueeze(1)
        pixels = pixels.div_(255).sub_(self._mean).div_(self._std)
        return {"inputs": pixels, "target": torch.from_numpy(self._labels[rows].astype(np.int64))}

    def column(self, name: str) -> NDArray[Any]:
        """Return all labels, as the column ``target``."""
        if name != "target":
            raise DataError(f"there is no column {name!r}; there is 'target'")
        return self._labels

    def __getstate__(self) -> dict[str, Any]:
        """Omit the mapped arrays: a loader worker maps the files again."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_images", "_labels")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore everything else and map the files."""
        self.__dict__.update(state)
        self._images, self._labels = self._open()

    def _open(self) -> tuple[NDArray[Any], NDArray[Any]]:
        images, labels = (read_idx(path) for path in self._paths)
        return images, labels


def read_idx(path: Path) -> NDArray[Any]:
    """Return the array in an IDX file, memory-mapped unless it is gzipped.

    Raises:
        DataError: the file is not an IDX file, or its size does not match its header.
    """
    try:
        if path.suffix == ".gz":
            content: NDArray[np.uint8] = np.frombuffer(gzip.decompress(path.read_bytes()), dtype=np.uint8)
        else:
            content = np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
    except (EOFError, gzip.BadGzipFile, zlib.error, ValueError) as error:
        raise DataError(f"{path} is damaged ({error})") from error
    magic = content[:4].tolist()
    if len(magic) < 4 or magic[:2] != [0, 0] or magic[2] not in _TYPES:
        raise DataError(f"{path} is not an IDX file: it begins with {bytes(magic)!r}")
    dtype, header_bytes = np.dtype(_TYPES[magic[2]]), 4 + 4 * magic[3]
    shape = tuple(int(size) for size in content[4:header_bytes].view(">u4"))
    expected = header_bytes + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if len(content) != expected:
        raise DataError(f"{path} has {len(content)} bytes, but its header requires {expected}")
    return content[header_bytes:].view(dtype).reshape(shape)


def _paths_in(folder: Path, split: str, provided_by: str | None) -> tuple[Path, ...]:
    if split not in _SPLITS:
        raise DataError(f"split {split!r} is unknown{did_you_mean(split, _SPLITS)}; use 'train' or 'test'")
    names = (f"{_SPLITS[split]}-images-idx3-ubyte", f"{_SPLITS[split]}-labels-idx1-ubyte")
    return tuple(
        zipped if (zipped := folder / f"{name}.gz").is_file() else existing(folder / name, provided_by=provided_by)
        for name in names
    )
