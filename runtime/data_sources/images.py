"""Image classification data: one folder of images per class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from runtime.errors import DataError, MissingDependencyError
from runtime.files import existing

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})


class ImageFolder(Dataset[dict[str, Any]]):
    """Images under ``folder/CLASS/``, at any depth; classes are numbered by the sorted names of the training data's folders.

    For random crops and flips use ``data.train.transform: {target: Augment, …}``, which draws under each sample's seed.
    Needs ``pip install pillow``.

    Args:
        folder: holds one folder per class. Files that are not images are ignored.
        exclude: shell patterns of paths within the folder to leave out, such as ``shapes/broken*.png``.
        size: height and width; the image is resized to cover both, then centre-cropped. Default: unchanged, for images of
            one size, or with a transform that makes them so.
        channels: 3 for RGB, 1 for greyscale. Transparent pixels become white.
        mean: per channel, subtracted from values between 0 and 1. Default: 0.
        std: per channel, divisor of the result. Default: 1.
        provided_by: command that installs the folder, for the error message if it is missing.

    A sample is ``{inputs: (channels, height, width) float32, target: int64 scalar}``. A folder of images without class folders
    is for data to predict: its samples have no target.

    Raises:
        DataError: the folder or its classes are missing, a class has no image, or a file cannot be read as an image.
        MissingDependencyError: Pillow is not installed.
    """

    deterministic = True
    shared_arguments = ("size", "channels", "mean", "std")
    """Arguments that data to predict takes over from the training data."""

    def __init__(
        self,
        folder: str,
        *,
        exclude: Sequence[str] = (),
        size: Sequence[int] | None = None,
        channels: int = 3,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        provided_by: str | None = None,
    ) -> None:
        if channels not in (1, 3):
            raise DataError(f"channels={channels}: use 3 (RGB) or 1 (greyscale)")
        if size is not None and (len(size) != 2 or min(size) < 1):
            raise DataError(f"size={list(size)}: give [height, width]")
        for name, values in (("mean", mean), ("std", std)):
            if values is not None and len(values) != channels:
                raise DataError(f"{name}={list(values)}: give one number for each of {channels} channels")
        try:
            import PIL.Image  # noqa: F401
        except ModuleNotFoundError as error:
            raise MissingDependencyError("pillow", "reading images", "images") from error
        self._folder = existing(folder, folder=True, provided_by=provided_by)
        self._size, self._mode = size, "RGB" if channels == 3 else "L"
        self._mean = torch.tensor(mean or [0.0] * channels).view(-1, 1, 1)
        self._std = torch.tensor(std or [1.0] * channels).view(-1, 1, 1)
        self.classes, self._paths, self._labels = _listed(self._folder, exclude)
        listed = "\n".join(f"{path}:{(self._folder / path).stat().st_size}" for path in self._paths)
        listing_digest = blake2b(listed.encode(), digest_size=16).hexdigest()
        self.fingerprint = f"images {listing_digest} size={size} channels={channels} mean={mean} std={std}"

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one image and the number of its class."""
        if not 0 <= index < len(self):
            raise IndexError(f"indices must lie between 0 and {len(self) - 1}")
        pixels = self._pixels(self._folder / self._paths[index])
        inputs = (pixels - self._mean) / self._std
        return {"inputs": inputs, "target": int(self._labels[index])} if self.classes else {"inputs": inputs}

    @property
    def fitted(self) -> dict[str, Any]:
        """Class names in the order of their numbers, for other splits to adopt."""
        return {"classes": list(self.classes)}

    def adopt(self, fitted: Mapping[str, Any]) -> None:
        """Number the classes as another split does. If it has none of these folders, they are images to predict, not classes.

        Raises:
            DataError: some of the folders are classes of the other split, and some are not.
        """
        names = list(fitted["classes"])
        unknown = [name for name in self.classes if name not in names]
        if len(unknown) == len(self.classes):
            return
        if unknown:
            raise DataError(
                f"{self._folder} has the class folder {unknown[0]!r}, which is not in the training data (its classes are "
                f"{', '.join(map(repr, names[:10]))}{', …' * (len(names) > 10)})"
            )
        numbers = np.array([names.index(name) for name in self.classes], dtype=np.int64)
        self._labels, self.classes = numbers[self._labels], names

    def column(self, name: str) -> NDArray[Any]:
        """Return the class number (``target``) or a part of the path of every image.

        The parts are ``folder``, ``file`` (a name such as 7.png) and ``stem`` (7).
        """
        paths = [Path(path) for path in self._paths]
        if name == "target" and self.classes:
            return self._labels
        if name not in ("folder", "file", "stem"):
            raise DataError(f"there is no column {name!r}; there are 'target', 'folder', 'file' and 'stem'")
        return np.array([{"folder": str(path.parent), "file": path.name, "stem": path.stem}[name] for path in paths])

    def _pixels(self, path: Path) -> Tensor:
        from PIL import Image, ImageOps

        try:
            with Image.open(path) as file:
                image = ImageOps.exif_transpose(file)
                if image.has_transparency_data:
                    image = image.convert("RGBA")
                    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
                image = image.convert(self._mode)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(f"{path} cannot be read as an image: {error}") from error
        if self._size is not None:
            height, width = self._size
            image = ImageOps.fit(image, (width, height), method=Image.Resampling.BICUBIC)
        values = np.asarray(image, dtype=np.float32)
        values = values[np.newaxis] if values.ndim == 2 else np.moveaxis(values, -1, 0)
        return torch.from_numpy(np.ascontiguousarray(values)) / 255


def _listed(folder: Path, exclude: Sequence[str]) -> tuple[list[str], list[str], NDArray[np.int64]]:
    """Return the classes, and the relative path and class number of each image, in sorted order."""
    unused = set(exclude)
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    places = [folder / name for name in classes]
    if not classes and any(_is_image(path) for path in folder.iterdir()):
        places = [folder]
    if not places:
        raise DataError(f"{folder} holds neither class folders nor images to predict")
    paths: list[str] = []
    labels: list[int] = []
    for number, place in enumerate(places):
        images = [path for path in place.rglob("*") if _is_image(path)]
        matches = {path: [p for p in exclude if fnmatchcase(path.relative_to(folder).as_posix(), p)] for path in images}
        unused -= {pattern for patterns in matches.values() for pattern in patterns}
        images = [path for path in images if not matches[path]]
        if not images:
            raise DataError(f"class folder {place} holds no image ({', '.join(sorted(SUFFIXES))})")
        paths += sorted(path.relative_to(folder).as_posix() for path in images)
        labels += [number] * len(images)
    if unused:
        raise DataError(f"exclude: no image in {folder} matches {', '.join(map(repr, sorted(unused)))}")
    return classes, paths, np.array(labels, dtype=np.int64)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and path.is_file()
