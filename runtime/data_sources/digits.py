"""Handwritten digits: 1,797 images of 8x8 pixels in 10 classes, part of scikit-learn."""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.data import TensorDataset

from runtime.errors import DataError, MissingDependencyError


def digits(
    split: str,
    *,
    validation_fraction: float = 0.2,
    seed: int = 0,
    as_images: bool = True,
) -> TensorDataset:
    """Load one split of the digits data.

    The split is stratified by class.

    Args:
        split: ``"train"`` or ``"validation"``.
        validation_fraction: fraction of the images held out for validation, above 0 and below 1.
        seed: determines which images are held out; must be the same for both splits.
        as_images: return images of shape (1, 8, 8), for a convolution, instead of flat ones, for an MLP.

    Returns:
        Pairs (image, class): float32 in [0, 1] of shape (1, 8, 8) or (64,), and an int64 scalar.

    Raises:
        DataError: the split is unknown, or ``validation_fraction`` leaves a part too small.
        MissingDependencyError: scikit-learn is not installed.
    """
    if split not in ("train", "validation"):
        raise DataError(f"split {split!r} is unknown: use 'train' or 'validation'")
    if not 0.0 < validation_fraction < 1.0:
        raise DataError(f"validation_fraction={validation_fraction}: it must lie between 0 and 1")
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ModuleNotFoundError as error:
        raise MissingDependencyError("scikit-learn", "the digits data", "examples") from error

    pixels, labels = load_digits(return_X_y=True)
    try:
        train, validation = train_test_split(
            np.arange(len(labels)),
            test_size=validation_fraction,
            stratify=labels,
            random_state=seed,
        )
    except ValueError as error:
        raise DataError(f"validation_fraction={validation_fraction}: {error}") from error
    rows = np.sort(train if split == "train" else validation)

    # Pixels count the dark dots in a cell of 4x4, so the maximum is 16.
    images = torch.from_numpy(pixels[rows].astype(np.float32) / 16)
    if as_images:
        images = images.view(-1, 1, 8, 8)
    return TensorDataset(images, torch.from_numpy(labels[rows].astype(np.int64)))
