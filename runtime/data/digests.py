"""Digests of samples: equal for equal contents, in any process and on any host."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor

_DEPTH = 8  # of nested objects: what lies deeper says nothing


def digest(value: Any, *, most_bytes: int | None = None) -> str:
    """Return a digest of a sample: of tensors, arrays, numbers and texts, nested in mappings, sequences and objects at will.

    Of an object of another kind counts what its attributes hold, or its type alone where it has none.

    Args:
        most_bytes: of each tensor, array or text only its first and last bytes count, each half as many. Default: all.
    """
    made = blake2b(digest_size=8)
    _add(made, value, most_bytes, _DEPTH)
    return made.hexdigest()


def digest_of_items(items: list[Any]) -> str:
    """Return a digest of how many items there are, and of the first and the last; cheap enough for each step."""
    return digest([len(items), *items[:1], *items[-1:]], most_bytes=8192)


def _add(made: Any, value: Any, most: int | None, depth: int) -> None:
    if isinstance(value, Tensor):
        made.update(f"tensor {value.dtype} {tuple(value.shape)} ".encode())
        _add_tensor(made, value, most)
    elif isinstance(value, np.ndarray | np.generic):
        found = np.asarray(value)
        made.update(f"array {found.dtype} {found.shape} ".encode())
        if found.dtype.hasobject:
            _add(made, found.tolist(), most, depth - 1)
        else:
            _add_bytes(made, np.ascontiguousarray(found).reshape(-1).view(np.uint8).data, most)
    elif isinstance(value, str | bytes | bytearray):
        made.update(f"{type(value).__name__} {len(value)} ".encode())
        _add_bytes(made, value.encode(errors="surrogatepass") if isinstance(value, str) else value, most)
    elif value is None or isinstance(value, bool | int | float | complex):
        made.update(f"{type(value).__name__} {value!r} ".encode())
    elif depth > 0:
        _add_parts(made, value, most, depth - 1)


def _add_parts(made: Any, value: Any, most: int | None, depth: int) -> None:
    made.update(f"{type(value).__qualname__} ".encode())
    if isinstance(value, Mapping):
        for key, part in value.items():
            made.update(f"{key!r:.200} ".encode())
            _add(made, part, most, depth)
    elif isinstance(value, list | tuple):
        made.update(f"{len(value)} ".encode())
        for part in value:
            _add(made, part, most, depth)
    elif isinstance(value, set | frozenset):
        for text in sorted(map(repr, value)):
            made.update(text.encode())
    elif hasattr(value, "tobytes") and hasattr(value, "size"):  # an image of PIL
        made.update(f"{value.size} {getattr(value, 'mode', '')} ".encode())
        _add_bytes(made, value.tobytes(), most)
    else:
        for name, part in sorted(_attributes(value).items()):
            made.update(f"{name} ".encode())
            _add(made, part, most, depth)


def _attributes(value: Any) -> dict[str, Any]:
    slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
    return {name: getattr(value, name) for name in slots if hasattr(value, name)} | getattr(value, "__dict__", {})


def _add_tensor(made: Any, value: Tensor, most: int | None) -> None:
    try:
        flat = value.detach().cpu().resolve_conj().resolve_neg().contiguous().view(-1)
        _add_bytes(made, flat.view(torch.uint8).numpy().data, most)
    except (RuntimeError, NotImplementedError, TypeError):  # sparse, nested or quantised: what it prints
        made.update(repr(value).encode())


def _add_bytes(made: Any, data: Any, most: int | None) -> None:
    if most is None or len(data) <= most:
        made.update(data)
    else:
        made.update(data[: most // 2])
        made.update(data[-(most // 2) :])
