"""Diabetes progression: 442 patients, 10 features, one value to predict, part of scikit-learn."""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.data import TensorDataset

from runtime.errors import DataError, MissingDependencyError


def diabetes(
    split: str,
    *,
    validation_fraction: float = 0.2,
    seed: int = 0,
) -> TensorDataset:
    """Load one split of the diabetes data (Efron et al. 2004, section 1).

    Features and target of both splits are standardised by the mean and standard deviation of the
    training part, so nothing of the validation part leaks into training. A root mean squared error
    is therefore in training standard deviations: always predicting the training mean scores 1.0 on
    the training part. Multiply it by that standard deviation, 78.30 with the default arguments, to
    get the target's units; a mean squared error by its square.

    Args:
        split: ``"train"`` or ``"validation"``.
        validation_fraction: fraction of the patients held out for validation, above 0 and below 1.
        seed: determines which patients are held out; must be the same for both splits.

    Returns:
        Pairs (features, target): float32 of shape (10,) and (1,).

    Raises:
        DataError: the split is unknown, or ``validation_fraction`` leaves a part too small.
        MissingDependencyError: scikit-learn is not installed.
    """
    if split not in ("train", "validation"):
        raise DataError(f"split {split!r} is unknown: use 'train' or 'validation'")
    if not 0.0 < validation_fraction < 1.0:
        raise DataError(f"validation_fraction={validation_fraction}: it must lie between 0 and 1")
    try:
        from sklearn.datasets import load_diabetes
        from sklearn.model_selection import train_test_split
    except ModuleNotFoundError as error:
        raise MissingDependencyError("scikit-learn", "the diabetes data", "examples") from error

    # scikit-learn's scaling would use the statistics of all patients.
    features, target = load_diabetes(return_X_y=True, scaled=False)
    table = np.column_stack([features, target])
    try:
        train, validation = train_test_split(
            np.arange(len(table)),
            test_size=validation_fraction,
            random_state=seed,
        )
    except ValueError as error:
        raise DataError(f"validation_fraction={validation_fraction}: {error}") from error
    mean, std = table[train].mean(axis=0), table[train].std(axis=0)
    rows = np.sort(train if split == "train" else validation)
    standardised = torch.from_numpy(((table[rows] - mean) / std).astype(np.float32))
    return TensorDataset(standardised[:, :-1], standardised[:, -1:])
