"""Orders based on one value per sample: grouping by length, batches by token budget, balanced classes.

Each epoch's batches are a function of (seed, epoch, values), computed identically on every rank.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from runtime.data.order import BuiltInOrder, EpochOrder, Ids, KeyedPermutation, digest_of_values
from runtime.errors import DataError
from runtime.randomness import Purpose, derive

_BLOCK = 4096  # draws of a class computed at once

Numbers = npt.NDArray[np.int64] | npt.NDArray[np.float64]


class LengthGroupedOrder(EpochOrder):
    """Batches of samples of similar length, every sample once per epoch.

    A keyed permutation is split into stretches of ``stretch_batches`` batches; within each, samples are sorted by length,
    longest first, and the batches of all stretches are then shuffled. (transformers' ``group_by_length`` leaves them sorted,
    so that lengths follow a sawtooth.) The smaller last batch stays last.

    Args:
        lengths: of each sample, (samples,).
        batch_size: samples of a global batch.
        drop_last: leave out the last, smaller batch: the last samples of the permutation, whatever their length.
        stretch_batches: larger values give more similar lengths and less random batches.
    """

    def __init__(
        self, lengths: Numbers, *, batch_size: int, seed: int, drop_last: bool = False, stretch_batches: int = 50
    ) -> None:
        super().__init__()
        self._lengths = lengths
        self._batch_size = batch_size
        self._seed = seed
        self._stretch = batch_size * stretch_batches
        self._num_used = len(lengths) - len(lengths) % batch_size if drop_last else len(lengths)

    def basis(self) -> str:
        """See :class:`runtime.data.order.Order`."""
        return digest_of_values(self._lengths)

    def num_batches(self, epoch: int) -> int:
        """Return the number of global batches, equal in every epoch."""
        return -(-self._num_used // self._batch_size)

    def _draw(self, epoch: int) -> list[Ids]:
        ids = _shuffled(len(self._lengths), self._seed, epoch)[: self._num_used]
        ids = _sorted_in_stretches(ids, self._lengths, self._stretch)
        size = self._batch_size
        batches = [ids[start : start + size] for start in range(0, len(ids), size)]
        return _shuffled_batches(batches, self._seed, epoch, keep_last=len(ids) % size > 0)


class BudgetOrder(EpochOrder):
    """Batches filled up to a budget of tokens (or any cost), every sample once per epoch.

    With shuffling, samples come in a keyed permutation; ``padded`` ones are sorted by length within stretches of about
    ``stretch_batches`` batches, since the longest sample sets the cost of a batch. Batches are then shuffled.

    Args:
        lengths: of each sample, (samples,): its tokens, or its cost.
        budget: maximum tokens in a batch.
        padded: count each sample with the length of the longest in its batch, as after padding; else with its own length.
        max_samples: maximum samples in a batch, however short.

    Raises:
        DataError: a single sample exceeds the budget.
    """

    def __init__(
        self,
        lengths: Numbers,
        *,
        budget: float,
        seed: int,
        max_samples: int,
        padded: bool = True,
        shuffle: bool = True,
        stretch_batches: int = 50,
    ) -> None:
        super().__init__()
        over = np.flatnonzero(lengths > budget)
        if over.size:
            raise DataError(
                f"sample {over[0]} alone has {lengths[over[0]]} tokens, more than data.budget.tokens {budget} (true of "
                f"{over.size} of {len(lengths)} samples): raise the budget, or shorten the samples"
            )
        self._lengths = lengths
        self._budget = budget
        self._max_samples = max_samples
        self._seed = seed
        self._padded = padded
        self._shuffle = shuffle
        mean = max(float(lengths.mean()), 1e-9) if len(lengths) else 1.0
        self._stretch = stretch_batches * max(1, min(max_samples, int(min(budget / mean, 2**31))))

    def basis(self) -> str:
        """See :class:`runtime.data.order.Order`."""
        return digest_of_values(self._lengths)

    def _draw(self, epoch: int) -> list[Ids]:
        ids = np.arange(len(self._lengths), dtype=np.int64)
        if self._shuffle:
            ids = _shuffled(len(ids), self._seed, epoch)
            if self._padded:
                ids = _sorted_in_stretches(ids, self._lengths, self._stretch)
        batches = list(self._filled(ids))
        return _shuffled_batches(batches, self._seed, epoch, keep_last=False) if self._shuffle else batches

    def _filled(self, ids: Ids) -> Iterator[Ids]:
        start, total, longest = 0, 0.0, 0.0
        for place, length in enumerate(self._lengths[ids].tolist()):
            total, longest, count = total + length, max(longest, length), place + 1 - start
            if (longest * count if self._padded else total) > self._budget or count > self._max_samples:
                yield ids[start:place]
                start, total, longest = place, length, length
        if start < len(ids):
            yield ids[start:]


class BalancedOrder(BuiltInOrder):
    """Each class equally often, whatever its size; each member of a class equally often.

    Each class is an endless stream: one keyed permutation of its members after another. Every epoch continues where the
    last one stopped, takes the same number of each class (to within one), and shuffles the result. So small classes repeat
    within an epoch, and large ones take several epochs to be seen completely.

    Args:
        classes: of each sample, (samples,) of any sortable type.
        batch_size: samples of a global batch.
        num_samples: draws of an epoch. Default: the number of samples.
        drop_last: leave out the last, smaller batch.
    """

    def __init__(
        self,
        classes: npt.NDArray[np.generic],
        *,
        batch_size: int,
        seed: int,
        num_samples: int | None = None,
        drop_last: bool = False,
    ) -> None:
        _, numbers, members = np.unique(classes, return_inverse=True, return_counts=True)
        by_class = np.argsort(numbers, kind="stable").astype(np.int64)
        self._members = np.split(by_class, np.cumsum(members)[:-1])
        self._numbers = numbers
        self._draws = len(classes) if num_samples is None else num_samples
        self._batch_size = batch_size
        self._seed = seed
        whole, rest = divmod(self._draws, batch_size)
        self._num_batches = whole if drop_last or not rest else whole + 1
        self._drawn: tuple[int, Ids] | None = None

    def basis(self) -> str:
        """See :class:`runtime.data.order.Order`."""
        return digest_of_values(self._numbers)

    def num_batches(self, epoch: int) -> int:
        """Return the number of global batches, equal in every epoch."""
        return self._num_batches

    def batch(self, epoch: int, index: int) -> Ids:
        """Return the sample ids of one global batch."""
        if self._drawn is None or self._drawn[0] != epoch:
            self._drawn = (epoch, self._draw(epoch))
        return self._drawn[1][index * self._batch_size : (index + 1) * self._batch_size]

    def _draw(self, epoch: int) -> Ids:
        # Draw t of the run (over all epochs) comes from class t modulo the number of classes.
        first, last = epoch * self._draws, (epoch + 1) * self._draws
        num_classes = len(self._members)
        taken = [
            self._stretch(number, -((number - first) // num_classes), -((number - last) // num_classes))
            for number in range(num_classes)
        ]
        drawn = np.concatenate(taken)
        return drawn[_shuffled(len(drawn), self._seed, epoch)]

    def _stretch(self, number: int, start: int, stop: int) -> Ids:
        """Return draws ``start`` to ``stop`` of a class's stream, whose permutations are computed in blocks."""
        members = self._members[number]
        size = len(members)
        turns = max(1, _BLOCK // size)
        parts = [np.zeros(0, dtype=np.int64)]
        for block in range(start // (size * turns), -(-stop // (size * turns))):
            # Sort random numbers: Philox's bits are the same in every version of NumPy, its permutations are not.
            bits = np.random.Philox(key=derive(self._seed, Purpose.ORDER, block, 2 + number)).random_raw(size * turns)
            order = np.argsort(bits.reshape(turns, size), axis=1, kind="stable").ravel()
            offset = block * size * turns
            parts.append(members[order[max(start - offset, 0) : stop - offset]])
        return np.concatenate(parts)


def _shuffled(size: int, seed: int, epoch: int) -> Ids:
    return KeyedPermutation(size, derive(seed, Purpose.ORDER, epoch))(np.arange(size, dtype=np.int64))


def _sorted_in_stretches(ids: Ids, lengths: Numbers, stretch: int) -> Ids:
    parts = [ids[start : start + stretch] for start in range(0, len(ids), stretch)]
    return np.concatenate([part[np.argsort(-lengths[part], kind="stable")] for part in parts])


def _shuffled_batches(batches: list[Ids], seed: int, epoch: int, *, keep_last: bool) -> list[Ids]:
    moved = len(batches) - keep_last
    if moved < 2:
        return batches
    places = KeyedPermutation(moved, derive(seed, Purpose.ORDER, epoch, 1))(np.arange(moved, dtype=np.int64))
    return [batches[place] for place in places.tolist()] + batches[moved:]
