"""Random seeds (keys): each depends only on (seed, purpose, position in the run), never on a rank's history.

Keys are hashed rather than shifted and added, because torch's CPU generator keeps only the low 32 bits of its seed.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt
import torch


class Purpose(IntEnum):
    """The purpose of a key; different purposes never share random numbers."""

    INITIALIZATION = 1
    ORDER = 2
    SLOT = 3
    SAMPLE = 4
    EVALUATION = 5
    DRAW = 6
    STREAM = 7
    STATISTICS = 8
    SPLIT = 9
    UPDATE = 10


_PYTHON: Any = random._inst  # the generator behind random.random()
_C_RANDOM: Any = random.Random.__base__
_KEY = struct.Struct("<4q")


def derive(seed: int, purpose: Purpose, epoch_or_step: int = 0, index: int = 0) -> int:
    """Return a 64-bit key for one use of randomness (blake2b over the four numbers)."""
    message = _KEY.pack(seed, purpose, epoch_or_step, index)
    return int.from_bytes(blake2b(message, digest_size=8).digest(), "little")


def seed_everything(key: int, device: torch.device) -> None:
    """Seed Python, NumPy, torch's CPU generator and the generator of ``device``.

    Seeds the generators directly: ``torch.manual_seed`` is a hundred times slower, because it visits every device type.
    """
    _C_RANDOM.seed(_PYTHON, key)  # same as random.seed of an integer, without a layer of Python
    _PYTHON.gauss_next = None
    np.random.seed(key & 0xFFFFFFFF)
    torch.default_generator.manual_seed(key)
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(key)


@contextmanager
def preserved_random_state(device: torch.device) -> Iterator[None]:
    """Restore the state of every generator that :func:`seed_everything` seeds."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    torch_state = torch.default_generator.get_state()
    device_state = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.default_generator.set_state(torch_state)
        if device_state is not None:
            torch.cuda.set_rng_state(device_state, device)


def mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Hash 64-bit values in place, and return them.

    The finaliser of splitmix64: Steele, Lea and Flood 2014, "Fast splittable generators", in Vigna's form.
    """
    values ^= values >> np.uint64(30)
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values
