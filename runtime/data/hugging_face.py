"""Hugging Face ``datasets``: tables in Arrow files, memory-mapped, possibly larger than memory.

The package is never imported here; its objects are recognised by the module of their type.
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

    If no format is set, it gets the format ``torch``. With ``set_transform`` or ``with_transform``, whose function may be
    random, it is read sample by sample under each sample's seed.
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
        """Return rows, read in one call."""
        return self.source.__getitems__(indices)

    def column(self, name: str) -> npt.NDArray[Any]:
        """Return one column; ``len:NAME`` gives the lengths of a column of sequences."""
        column_name = name.removeprefix("len:")
        if column_name not in self.source.column_names:
            hint = did_you_mean(column_name, self.source.column_names)
            raise DataError(f"the data set has no column {column_name!r}{hint}")
        column = self.source.select_columns([column_name]).with_format("arrow")[:].column(column_name)
        if name != column_name:
            import pyarrow.compute as pc

            column = pc.list_value_length(column)
        values: npt.NDArray[Any] = np.asarray(column.to_numpy())
        return values


def adapted(source: Any, key: str) -> Any:
    """Wrap a Hugging Face data set in :class:`ArrowRows`; return any other unchanged.

    Raises:
        DataError: the source is a mapping of splits.
    """
    kind = type(source)
    if kind.__module__.partition(".")[0] != "datasets":
        return source
    if isinstance(source, dict):
        raise DataError(
            f"{key}: this is a {kind.__name__} with the splits {', '.join(source)}; choose one, with load_dataset's 'split' "
            "argument or load_from_disk of that split's folder"
        )
    return ArrowRows(source) if kind.__name__ == "Dataset" else source
