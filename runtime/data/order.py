"""The samples of each global batch: any batch of any epoch in constant time, without iterating up to it.

An order is a function of (seed, epoch, batch), equal on every rank. Shuffling is a keyed permutation of [0, N), computed
only for the requested positions; no array of size N exists.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from runtime.errors import DataError
from runtime.randomness import Purpose, derive, mix, preserved_random_state, seed_everything

Ids = npt.NDArray[np.int64]

_ROUNDS = 12  # enough for all permutations of tiny sets to be about equally frequent
_BLOCK = 8192  # positions enciphered at once: reduces the cost per id from 0.5 to 0.1 µs
_HALF = np.uint64(32)
_CPU = torch.device("cpu")


class Order(Protocol):
    """The global batches of every epoch."""

    def num_batches(self, epoch: int) -> int:
        """Return the number of global batches in an epoch."""
        ...

    def batch(self, epoch: int, index: int) -> Ids:
        """Return the sample ids of one global batch: (samples,) int64."""
        ...

    def basis(self) -> str:
        """Return a digest of the user's values that the order depends on; empty if there are none."""
        ...

    def drawn_until(self, epoch: int) -> int:
        """Return a digest, below 2**32, of the user code's draws up to and including this epoch; 0 if there are none."""
        ...


def digest_of_values(values: npt.NDArray[Any]) -> str:
    """Return a digest of one value per sample, of any dtype."""
    plain = values.astype(str) if values.dtype.hasobject else values
    return f"{plain.dtype.str}{plain.shape} {zlib.crc32(np.ascontiguousarray(plain).tobytes()):08x}"


class KeyedPermutation:
    """A pseudorandom permutation of [0, size), computed position by position.

    A Feistel network over Z_a x Z_b with a * b just above ``size``, with cycle walking for values outside (Black and
    Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). The excess is below ``sqrt(size)``, so few positions are
    enciphered twice.
    """

    def __init__(self, size: int, key: int) -> None:
        if not 1 <= size <= 2**62:
            raise ValueError(f"size must be between 1 and 2**62, not {size}")
        self.size = size
        self._rows = np.uint64(math.isqrt(size - 1) + 1)
        self._columns = np.uint64(-(-size // int(self._rows)))
        generator = np.random.Generator(np.random.Philox(key=key))
        self._keys = generator.integers(0, 2**64, size=_ROUNDS, dtype=np.uint64)

    def __call__(self, positions: Ids) -> Ids:
        """Map positions to ids: (n,) int64 to (n,) int64."""
        ids = self._encipher(positions.astype(np.uint64))
        outside = np.flatnonzero(ids >= self.size)
        while outside.size:
            ids[outside] = self._encipher(ids[outside])
            outside = outside[ids[outside] >= self.size]
        return ids.astype(np.int64)

    def _encipher(self, values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        right, left = np.divmod(values, self._rows)
        for number, key in enumerate(self._keys):
            modulus = self._rows if number % 2 == 0 else self._columns
            # left + f(right), reduced without a division, which would take most of the time.
            shift = mix(right + key)
            shift >>= _HALF
            shift *= modulus
            shift >>= _HALF
            shift += left
            left, right = (
                right,
                np.minimum(shift, shift - modulus),
            )  # a negative difference wraps around to a huge value
        return right * self._rows + left


class BuiltInOrder:
    """Base class of orders that are a function of seed, epoch and possibly one value per sample, not drawn by user code."""

    def basis(self) -> str:
        """See :class:`Order`."""
        return ""

    def drawn_until(self, epoch: int) -> int:
        """See :class:`Order`."""
        return 0


class IndexOrder(BuiltInOrder):
    """Every index once per epoch, shuffled or sequential."""

    def __init__(self, num_samples: int, *, batch_size: int, seed: int, shuffle: bool, drop_last: bool) -> None:
        self._num_samples = num_samples
        self._batch_size = batch_size
        self._seed = seed
        self._shuffle = shuffle
        whole, rest = divmod(num_samples, batch_size)
        self._num_batches = whole if drop_last or not rest else whole + 1
        self._drawn: tuple[int, int, Ids] | None = None
        self._permutation: tuple[int, KeyedPermutation] | None = None
        self._block = batch_size * max(1, _BLOCK // batch_size)

    def num_batches(self, epoch: int) -> int:
        """Return the number of global batches, equal in every epoch."""
        return self._num_batches

    def batch(self, epoch: int, index: int) -> Ids:
        """Return the sample ids of one global batch."""
        start = index * self._batch_size
        stop = min(start + self._batch_size, self._num_samples)
        if not self._shuffle:
            return np.arange(start, stop, dtype=np.int64)
        block_start = start - start % self._block
        if self._drawn is None or self._drawn[:2] != (epoch, block_start):
            block_stop = min(block_start + self._block, self._num_samples)
            positions = np.arange(block_start, block_stop, dtype=np.int64)
            self._drawn = (epoch, block_start, self._permutation_of(epoch)(positions))
        return self._drawn[2][start - block_start : stop - block_start]

    def _permutation_of(self, epoch: int) -> KeyedPermutation:
        if self._permutation is None or self._permutation[0] != epoch:
            key = derive(self._seed, Purpose.ORDER, epoch)
            self._permutation = (epoch, KeyedPermutation(self._num_samples, key))
        return self._permutation[1]


class WeightedOrder(BuiltInOrder):
    """Draws with replacement, each id with a probability proportional to its weight.

    Draw j of an epoch depends only on (seed, epoch, j). Holds one number per sample in memory.

    Args:
        weights: (samples,) non-negative numbers with a sum above zero.
        num_draws: samples of an epoch. Default: the number of weights.
    """

    def __init__(
        self, weights: npt.ArrayLike, *, num_draws: int | None = None, batch_size: int, seed: int, drop_last: bool
    ) -> None:
        values = np.asarray(weights, dtype=np.float64)
        if values.ndim != 1 or not np.isfinite(values).all() or (values < 0).any() or not values.sum() > 0:
            raise DataError("sampling weights must be a list of finite numbers, none negative and not all zero")
        self._ends = np.cumsum(values)
        self._last = int(np.flatnonzero(values)[-1])  # rounding must not reach an id of weight 0 at the end
        self._positions = IndexOrder(
            len(values) if num_draws is None else num_draws,
            batch_size=batch_size,
            seed=seed,
            shuffle=False,
            drop_last=drop_last,
        )
        self._seed = seed
        self._drawn: tuple[int, int, Ids] | None = None

    def basis(self) -> str:
        """See :class:`Order`."""
        return digest_of_values(self._ends)

    def num_batches(self, epoch: int) -> int:
        """Return the number of global batches, equal in every epoch."""
        return self._positions.num_batches(epoch)

    def batch(self, epoch: int, index: int) -> Ids:
        """Return the sample ids of one global batch."""
        places = self._positions.batch(epoch, index)
        blocks = [self._block(epoch, block) for block in range(places[0] // _BLOCK, places[-1] // _BLOCK + 1)]
        first = int(places[0]) % _BLOCK
        return (
            np.concatenate(blocks)[first : first + len(places)]
            if len(blocks) > 1
            else blocks[0][first : first + len(places)]
        )

    def _block(self, epoch: int, block: int) -> Ids:
        if self._drawn is None or self._drawn[:2] != (epoch, block):
            key = derive(self._seed, Purpose.DRAW, epoch, block)
            uniform = np.random.Generator(np.random.Philox(key=key)).random(_BLOCK)
            ids = np.searchsorted(self._ends, uniform * self._ends[-1], side="right")
            self._drawn = (epoch, block, np.minimum(ids, self._last).astype(np.int64))
        return self._drawn[2]


class EpochOrder(BuiltInOrder):
    """An order that draws a whole epoch at its first use; holds one epoch's ids in memory."""

    def __init__(self) -> None:
        self._drawn: tuple[int, list[Ids]] | None = None

    def num_batches(self, epoch: int) -> int:
        """Return the number of global batches in an epoch."""
        return len(self._batches(epoch))

    def batch(self, epoch: int, index: int) -> Ids:
        """Return the sample ids of one global batch."""
        return self._batches(epoch)[index]

    def _batches(self, epoch: int) -> list[Ids]:
        if self._drawn is None or self._drawn[0] != epoch:
            self._drawn = (epoch, self._draw(epoch))
        return self._drawn[1]

    def _draw(self, epoch: int) -> list[Ids]:
        raise NotImplementedError


class SamplerOrder(EpochOrder):
    """A torch sampler or batch sampler, drawn once per epoch under the epoch's seed, identically on every rank."""

    def __init__(
        self, sampler: Iterable[Any], *, num_samples: int, batch_size: int | None, seed: int, drop_last: bool
    ) -> None:
        """Wrap a sampler of indices, or with ``batch_size=None`` a batch sampler, whose batches are the global batches."""
        super().__init__()
        self._sampler = sampler
        self._num_samples = num_samples
        self._batch_size = batch_size
        self._seed = seed
        self._drop_last = drop_last
        self._digests: dict[int, int] = {}

    @property
    def sampler(self) -> Iterable[Any]:
        """The user's sampler."""
        return self._sampler

    @property
    def draws_samples(self) -> bool:
        """Whether the sampler draws single samples, not global batches."""
        return self._batch_size is not None

    def repeats(self) -> bool:
        """Draw the first epoch again under its seed and return whether it is the same."""
        first = self._batches(0)
        again = self._draw(0)
        return len(first) == len(again) and all(map(np.array_equal, first, again))

    def drawn_until(self, epoch: int) -> int:
        """See :class:`Order`."""
        return zlib.crc32(repr([item for item in sorted(self._digests.items()) if item[0] <= epoch]).encode())

    def _draw(self, epoch: int) -> list[Ids]:
        drawn = self._drawn_now(epoch)
        digest = 0
        for ids in drawn:
            digest = zlib.crc32(ids.tobytes(), digest ^ len(ids))
        # Of the sampler's indices before they are batched, which do not depend on the global batch size.
        self._digests[epoch] = digest
        return [batch for batch in (drawn if self._batch_size is None else self._cut(drawn[0])) if batch.size]

    def _drawn_now(self, epoch: int) -> list[Ids]:
        """Return the batches of a batch sampler, or all indices of a sampler as one."""
        with preserved_random_state(_CPU):
            seed_everything(derive(self._seed, Purpose.ORDER, epoch), _CPU)
            if hasattr(self._sampler, "set_epoch"):
                self._sampler.set_epoch(epoch)
            drawn = list(self._sampler)
        return [self._checked(batch) for batch in (drawn if self._batch_size is None else [drawn])]

    def _cut(self, ids: Ids) -> list[Ids]:
        assert self._batch_size is not None
        batches = [ids[start : start + self._batch_size] for start in range(0, len(ids), self._batch_size)]
        return batches[:-1] if self._drop_last and batches and len(batches[-1]) < self._batch_size else batches

    def _checked(self, batch: Any) -> Ids:
        try:
            ids = np.asarray(batch, dtype=np.int64)
        except (ValueError, TypeError):
            ids = np.zeros((0, 0), dtype=np.int64)
        if ids.ndim != 1 or (ids.size and not (ids.min() >= 0 and ids.max() < self._num_samples)):
            raise DataError(
                f"the sampler must draw a list of indices from 0 to {self._num_samples - 1}, not {batch!r:.80}"
            )
        return ids
