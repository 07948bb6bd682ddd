"""Reduces tensors over the slots of a step, on whichever ranks they are.

:class:`OrderedReduction` gives the same bits on any number of ranks (``determinism: exact``): its additions are those of
:mod:`runtime.distributed.slot_tree`. Each rank is the owner of a part of the tensor: it receives that part of every node of
every rank's cover, adds them up, and sends the result to all. A rank whose slots are one node sends no more than in an
ordinary all-reduce. :class:`RankReduction` is that all-reduce.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from runtime.distributed.slot_tree import cover, total

ABSENT = -0.0
"""Added to any number, -0.0 included, it leaves the number as it is."""


class SlotReduction(Protocol):
    """Sums flat tensors over all slots. Every rank must make the same calls."""

    own_slots: range
    """Slots of this rank."""
    alone: bool
    """Whether this rank runs all slots."""
    ordered: bool
    """Whether the sum is the same bits on any number of ranks."""

    def sum(self, values: Sequence[Tensor | None], like: Tensor) -> Tensor:
        """Return the sum over all slots, equal on all ranks, -0.0 without any value; may reuse the values' memory. Collective.

        Args:
            values: this rank's sums (numbers,) of the nodes of its slots' :func:`runtime.distributed.slot_tree.cover`, from
                left to right; None for one without a value.
            like: a tensor of the values' shape, dtype and device.
        """
        ...


class RankReduction:
    """Sums over each rank's slots, and then over the ranks in the order of the process group's algorithm.

    Args:
        own_slots: slots of this rank.
        world_size: number of ranks.
    """

    ordered = False

    def __init__(self, own_slots: range, *, world_size: int) -> None:
        self.own_slots, self.alone = own_slots, world_size == 1
        self._cover = cover(own_slots)

    def sum(self, values: Sequence[Tensor | None], like: Tensor) -> Tensor:
        """See :class:`SlotReduction`."""
        result = total(zip(self._cover, values, strict=True), _add)
        result = torch.full_like(like, ABSENT) if result is None else result
        if not self.alone:
            dist.all_reduce(result)
        return result


class OrderedReduction:
    """Sums in the order of the tree of slots.

    Args:
        slots: consecutive slots of each rank.
        rank: this process.
    """

    ordered = True

    def __init__(self, slots: Sequence[range], *, rank: int) -> None:
        self.own_slots, self.alone = slots[rank], len(slots) == 1
        self._world_size, self.rank = len(slots), rank
        self._covers = [cover(of_rank) for of_rank in slots]

    def sum(self, values: Sequence[Tensor | None], like: Tensor) -> Tensor:
        """See :class:`SlotReduction`."""
        result = next((value for value in values if value is not None), None)
        if self.alone:
            result = total(zip(self._covers[0], values, strict=True), _add)
        elif any(len(nodes) > 1 for nodes in self._covers) or sum(map(len, self._covers)) > 2:
            return self._sum_by_owners(values, like)
        result = torch.full_like(like, ABSENT) if result is None else result
        if not self.alone:
            dist.all_reduce(result)  # one addition, whose operands may be exchanged
        return result

    def sum_of_own_part(self, values: Sequence[Tensor | None], like: Tensor) -> Tensor:
        """Return this rank's part of the sum over all slots, -0.0 without any value; may reuse the values' memory. Collective.

        Args:
            values: as for :meth:`sum`; each consists of as many equal parts as there are ranks, in their order.
            like: a tensor of the values' shape, dtype and device.
        """
        size, own = like.numel() // self._world_size, self._covers[self.rank]
        present = [torch.full_like(like, ABSENT) if value is None else value for value in values]
        if self.alone:
            result = total(zip(own, present, strict=True), _add)
            assert result is not None
            return result
        parts = [value[owner * size : (owner + 1) * size] for owner in range(self._world_size) for value in present]
        sent = torch.cat(parts) if parts else like.new_empty(0)
        nodes = [node for nodes in self._covers for node in nodes]
        received = like.new_empty(len(nodes) * size)
        dist.all_to_all_single(
            received,
            sent,
            output_split_sizes=[len(nodes) * size for nodes in self._covers],
            input_split_sizes=[len(values) * size] * self._world_size,
        )
        result = total(zip(nodes, torch.split(received, size), strict=True), _add)
        assert result is not None
        return result

    def _sum_by_owners(self, values: Sequence[Tensor | None], like: Tensor) -> Tensor:
        size = -(-like.numel() // self._world_size)
        result = like.new_empty(size * self._world_size)
        padded = [None if value is None else _padded(value, result.numel()) for value in values]
        dist.all_gather(list(torch.split(result, size)), self.sum_of_own_part(padded, result))
        return result[: like.numel()]


def _padded(value: Tensor, size: int) -> Tensor:
    padded = value.new_full((size,), ABSENT)
    padded[: value.numel()] = value
    return padded


def _add(left: Tensor, right: Tensor) -> Tensor:
    return left.add_(right)
