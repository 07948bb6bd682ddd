"""Data sets of Hugging Face's ``datasets``: tables in Arrow files, memory-mapped, larger than memory.

The package is never imported here; what it makes is told by its type.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from runtime.errors import DataError
from runtime.wording import did_you_mean


class ArrowRows(Dataset[Any]):
    """A ``datasets.Dataset``, read a whole microbatch at a time through its ``__getitems__``.

    Without a format of its own it gets torch's. With ``set_transform`` or ``with_transform``, whose function may be random,
    it is read sample by sample under each sample's seed.
    """

    def __init__(self, source: Any) -> None:
        kind = source.format["type"]
        self.source = source.with_format("torch") if kind is None else source
        self.deterministic = kind != "custom"
        self.fingerprint = f"datasets {source._fingerprint}"

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Any:
        return self.source[index]

    def __getitems__(self, indices: list[int]) -> Any:
        """Return a list of rows, read at once."""
        return self.source.__getitems__(indices)

    def column(self, name: str) -> npt.NDArray[Any]:
        """Return one column; of sequences, their lengths are ``len:NAME``."""
        wanted = name.removeprefix("len:")
        if wanted not in self.source.column_names:
            raise DataError(f"the data set has no column {wanted!r}{did_you_mean(wanted, self.source.column_names)}")
        column = self.source.select_columns([wanted]).with_format("arrow")[:].column(wanted)
        if name != wanted:
            import pyarrow.compute as pc

            column = pc.list_value_length(column)
        found: npt.NDArray[Any] = np.asarray(column.to_numpy())
        return found


def adapted(source: Any, key: str) -> Any:
    """Return a data set that Lockstep reads: Hugging Face's wrapped, every other as it is.

    Raises:
        DataError: it is a mapping of splits.
    """
    kind = type(source)
    if kind.__module__.partition(".")[0] != "datasets":
        return source
    if isinstance(source, dict):
        raise DataError(
            f"{key}: this is a {kind.__name__} with the splits {', '.join(source)}; name one, with load_dataset's 'split' "
            "argument or load_from_disk of that split's folder"
        )
    return ArrowRows(source) if kind.__name__ == "Dataset" else source
