"""Convert nested state to named tensors and JSON; write safetensors files with a checksum computed while writing.

Nothing is ever pickled or unpickled. Plain JSON would turn integer keys into text (MultiStepLR would never lower its rate)
and has no tuples or infinities, so these are encoded.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from runtime.errors import CheckpointError
from runtime.state.durable_files import write_durably
from runtime.state.memory_layout import laid_out, strides_to_keep
from runtime.state.shards import Shard

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.complex64: "C64",
}  # fmt: skip


def split_state(state: Any, shards: dict[str, Shard] | None = None) -> tuple[Any, dict[str, Tensor]]:
    """Split nested state into a JSON-serialisable tree and a flat mapping of tensors, which are not copied.

    Tensors that are the same view of the same memory (tied weights) are stored once. Strides are stored in the tree.

    Args:
        shards: filled with this rank's shards; default: the state has none.

    Raises:
        CheckpointError: a value is neither a tensor nor plain data; names its path.
    """
    tensors: dict[str, Tensor] = {}
    seen: dict[Any, str] = {}

    def first_name(value: Tensor, path: str) -> str:
        fingerprint = (value.data_ptr(), value.shape, value.stride(), value.dtype) if value.numel() else path
        return seen.setdefault(fingerprint, path)

    def split(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            name = first_name(value, path)
            if name == path:
                tensors[path] = value.detach()
            strides = strides_to_keep(value)
            return {"$tensor": name} if strides is None else {"$tensor": name, "strides": strides}
        if isinstance(value, Shard):
            assert shards is not None
            name = path if value.part is None else first_name(value.part, path)
            if name == path:
                shards[path] = value
            return {"$tensor": name}
        if isinstance(value, Mapping):
            if all(isinstance(key, str) and not key.startswith("$") for key in value):
                return {key: split(inner, f"{path}/{key}" if path else key) for key, inner in value.items()}
            return {"$items": [[split(k, f"{path}/key"), split(v, f"{path}/{k}")] for k, v in value.items()]}
        if isinstance(value, tuple):
            return {"$tuple": [split(inner, f"{path}/{i}") for i, inner in enumerate(value)]}
        if isinstance(value, list):
            return [split(inner, f"{path}/{i}") for i, inner in enumerate(value)]
        if isinstance(value, np.generic):
            value = value.item()
        if isinstance(value, float) and not math.isfinite(value):
            return {"$float": repr(value)}
        if isinstance(value, bytes | bytearray):
            return {"$bytes": value.hex()}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise CheckpointError(
            f"the state at {path!r} is a {type(value).__name__}; only tensors and plain data can be saved (no pickle)"
        )

    return split(state, ""), tensors


def join_state(tree: Any, tensors: Mapping[str, Any]) -> Any:
    """Undo :func:`split_state`.

    Args:
        tensors: by name; in memory, or on disk to be read lazily.
    """
    laid: dict[str, Any] = {}  # one tensor for all names of a tied weight

    def named(name: str, strides: list[int] | None) -> Any:
        if strides is None:
            return tensors[name]
        if name not in laid:
            tensor = tensors[name]
            laid[name] = laid_out(tensor, strides) if isinstance(tensor, Tensor) else tensor.with_strides(strides)
        return laid[name]

    def join(tree: Any) -> Any:
        if isinstance(tree, list):
            return [join(inner) for inner in tree]
        if not isinstance(tree, dict):
            return tree
        if "$tensor" in tree:
            return named(tree["$tensor"], tree.get("strides"))
        if set(tree) == {"$tuple"}:
            return tuple(join(inner) for inner in tree["$tuple"])
        if set(tree) == {"$items"}:
            return {join(key): join(value) for key, value in tree["$items"]}
        if set(tree) == {"$float"}:
            return float(tree["$float"])
        if set(tree) == {"$bytes"}:
            return bytes.fromhex(tree["$bytes"])
        return {key: join(inner) for key, inner in tree.items()}

    return join(tree)


def dtype_name(dtype: torch.dtype) -> str:
    """Return the safetensors name of a dtype.

    Raises:
        KeyError: safetensors does not support it.
    """
    return _DTYPES[dtype]


def dtype_called(name: str) -> torch.dtype:
    """Return the dtype with this safetensors name."""
    return {its_name: dtype for dtype, its_name in _DTYPES.items()}[name]


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> tuple[int, str]:
    """Write a safetensors file durably; return its size in bytes and its sha256.

    Does not use the safetensors library, so that the checksum is computed in the same pass and the same descriptor is synced.
    """
    assert sys.byteorder == "little"
    header: dict[str, Any] = {}
    offset = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise CheckpointError(f"tensor {name!r} has type {tensor.dtype}, which safetensors does not support")
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    parts: list[Any] = [len(text).to_bytes(8, "little"), text]
    parts += [tensor.reshape(-1).view(torch.uint8).numpy().data for tensor in tensors.values() if tensor.numel()]
    return write_durably(path, *parts)
