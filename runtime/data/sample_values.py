"""One value per sample of a data set (a length, weight, class or group), without reading the samples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import TensorDataset

from runtime.config.component import described
from runtime.data.splitting import Subset, TensorSubset
from runtime.errors import DataError, LockstepError

Values = npt.NDArray[Any]


def values_of(source: Any, where: str | int | Callable[[Any], Any], key: str, *, numbers: bool = False) -> Values:
    """Return (samples,) values.

    Args:
        where: a column of the source; the position of a tensor in a TensorDataset; an ``.npy`` file; or a function of the
            source. For a subset, all refer to the whole data set.
        key: of the configuration, for messages.
        numbers: whether they must be finite and not negative; then returned as int64 or float64.

    Raises:
        DataError: there is no such column or file, or not one value per sample.
    """
    if isinstance(source, Subset | TensorSubset):
        return values_of(source.source, where, key, numbers=numbers)[source.ids]
    try:
        values = np.asarray(where(source) if callable(where) else _looked_up(source, where))
    except LockstepError as error:
        raise DataError(f"{key}: {error}") from error
    except Exception as error:
        raise DataError(f"{key}: {where!s:.80} raised {described(error)}") from error
    if values.shape != (len(source),):
        raise DataError(f"{key}: one value for each of {len(source)} samples is needed, not shape {values.shape}")
    if not numbers:
        return values
    if not (values.dtype.kind in "iufb" and np.isfinite(values).all() and (values >= 0).all()):
        raise DataError(f"{key}: all values must be finite numbers, none negative")
    return values.astype(np.float64 if values.dtype.kind == "f" else np.int64)


def _looked_up(source: Any, where: str | int) -> Any:
    if isinstance(where, str) and where.endswith(".npy"):
        path = Path(where).expanduser()
        if not path.is_file():
            raise DataError(f"there is no file {path}")
        return np.load(path, mmap_mode="r", allow_pickle=False)
    if hasattr(source, "column"):
        return source.column(where)
    if isinstance(source, TensorDataset) and isinstance(where, int):
        if not 0 <= where < len(source.tensors):
            raise DataError(f"there is no tensor {where}; there are {len(source.tensors)}")
        return source.tensors[where].numpy()
    kind = type(source).__name__
    raise DataError(
        f"{kind} has no columns, so {where!r} cannot be found: give an .npy file, or a function (target) of the data set"
    )
