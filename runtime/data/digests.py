"""Digests of samples: equal for equal contents, in any process and on any host."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor

_DEPTH = 8  # of nested objects; anything deeper is ignored


def digest(value: Any, *, max_bytes: int | None = None) -> str:
    """Return a digest of a sample: of tensors, arrays, numbers and texts, nested in mappings, sequences and objects.

    An object of another kind is digested by its type and attributes.

    Args:
        max_bytes: digest only this many bytes of each tensor, array or text, half at its start, half at its end. Default:
            all.
    """
    hasher = blake2b(digest_size=8)
    _add(hasher, value, max_bytes, _DEPTH)
    return hasher.hexdigest()


def digest_of_items(items: list[Any]) -> str:
    """Return a digest of the number of items, the first and the last; cheap enough for each step."""
    return digest([len(items), *items[:1], *items[-1:]], max_bytes=8192)


def _add(hasher: Any, value: Any, limit: int | None, depth: int) -> None:
    if isinstance(value, Tensor):
        hasher.update(f"tensor {value.dtype} {tuple(value.shape)} ".encode())
        _add_tensor(hasher, value, limit)
    elif isinstance(value, np.ndarray | np.generic):
        values = np.asarray(value)
        hasher.update(f"array {values.dtype} {values.shape} ".encode())
        if values.dtype.hasobject:
            _add(hasher, values.tolist(), limit, depth - 1)
        else:
            _add_bytes(hasher, np.ascontiguousarray(values).reshape(-1).view(np.uint8).data, limit)
    elif isinstance(value, str | bytes | bytearray):
        hasher.update(f"{type(value).__name__} {len(value)} ".encode())
        _add_bytes(hasher, value.encode(errors="surrogatepass") if isinstance(value, str) else value, limit)
    elif value is None or isinstance(value, bool | int | float | complex):
        hasher.update(f"{type(value).__name__} {value!r} ".encode())
    elif depth > 0:
        _add_parts(hasher, value, limit, depth - 1)


def _add_parts(hasher: Any, value: Any, limit: int | None, depth: int) -> None:
    hasher.update(f"{type(value).__qualname__} ".encode())
    if isinstance(value, Mapping):
        for key, part in value.items():
            hasher.update(f"{key!r:.200} ".encode())
            _add(hasher, part, limit, depth)
    elif isinstance(value, list | tuple):
        hasher.update(f"{len(value)} ".encode())
        for part in value:
            _add(hasher, part, limit, depth)
    elif isinstance(value, set | frozenset):
        for text in sorted(map(repr, value)):
            hasher.update(text.encode())
    elif hasattr(value, "tobytes") and hasattr(value, "size"):  # a PIL image
        hasher.update(f"{value.size} {getattr(value, 'mode', '')} ".encode())
        _add_bytes(hasher, value.tobytes(), limit)
    else:
        for name, part in sorted(_attributes(value).items()):
            hasher.update(f"{name} ".encode())
            _add(hasher, part, limit, depth)


def _attributes(value: Any) -> dict[str, Any]:
    slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
    return {name: getattr(value, name) for name in slots if hasattr(value, name)} | getattr(value, "__dict__", {})


def _add_tensor(hasher: Any, value: Tensor, limit: int | None) -> None:
    try:
        flat = value.detach().cpu().resolve_conj().resolve_neg().contiguous().view(-1)
        _add_bytes(hasher, flat.view(torch.uint8).numpy().data, limit)
    except (RuntimeError, NotImplementedError, TypeError):  # sparse, nested or quantised: use its repr
        hasher.update(repr(value).encode())


def _add_bytes(hasher: Any, data: Any, limit: int | None) -> None:
    if limit is None or len(data) <= limit:
        hasher.update(data)
    else:
        hasher.update(data[: limit // 2])
        hasher.update(data[-(limit // 2) :])
