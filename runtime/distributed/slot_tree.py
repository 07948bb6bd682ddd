"""Sums over a step's slots whose every addition has the same operands on any number of ranks.

Floating-point addition is not associative, so a sum over a rank's slots and then over ranks depends on which rank ran which
slot. Here the slots 0 … K-1 are the leaves of one binary tree: node (level, number) is the sum of the slots from
``number * 2**level`` up to the next node of its level, and is always its left child plus its right child. Each rank adds up the
nodes that lie wholly within its consecutive slots, its :func:`cover`; the remaining additions join nodes of several ranks.

A slot without a value is absent, not zero: the node above it equals its other child. Of all fixed orders this one has the
smallest error bound: it grows with the logarithm of the number of slots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")


class Node(NamedTuple):
    """The slots from ``number * 2**level`` on, ``2**level`` of them."""

    level: int
    number: int

    @property
    def slots(self) -> range:
        """The slots under this node."""
        return range(self.number << self.level, (self.number + 1) << self.level)

    @property
    def parent(self) -> Node:
        """The node that this one is a child of."""
        return Node(self.level + 1, self.number >> 1)

    def contains(self, other: Node) -> bool:
        """Return whether another node is this one or lies under it."""
        return other.level <= self.level and other.number >> (self.level - other.level) == self.number


def cover(slots: range) -> list[Node]:
    """Return the fewest nodes that consist of exactly these consecutive slots, from left to right."""
    nodes, start = list[Node](), slots.start
    while start < slots.stop:
        level = (slots.stop - start).bit_length() - 1
        if start:
            level = min(level, (start & -start).bit_length() - 1)
        nodes.append(Node(level, start >> level))
        start += 1 << level
    return nodes


class RunningSum(Generic[T]):
    """Adds up the values of one rank's slots as they come, in memory for a logarithm of their number.

    Args:
        slots: of this rank.
        add: returns the sum of two values, left and right; may reuse the left one's memory.

    Attributes:
        nodes: the slots' :func:`cover`.
    """

    def __init__(self, slots: range, add: Callable[[T, T], T]) -> None:
        self._slots, self._add = slots, add
        self.nodes = cover(slots)
        self._held: list[tuple[Node, T]] = []

    @property
    def held(self) -> int:
        """How many sums are held now."""
        return len(self._held)

    def put(self, node: Node, value: T) -> None:
        """Add the value of one slot, or of several under one node; from left to right."""
        self._join(before=node.slots.start)
        self._held.append((node, value))

    def take(self) -> list[T | None]:
        """Return the sums of the nodes, None for one without a value, and begin anew."""
        self._join(before=self._slots.stop)
        held, self._held = dict(self._held), []
        return [next((value for node, value in held.items() if whole.contains(node)), None) for whole in self.nodes]

    def _join(self, *, before: int) -> None:
        """Add up what lies under nodes that get no more values: they end before this slot."""
        while self._held:
            node, value = self._held[-1]
            above = node.parent.slots
            if above.start < self._slots.start or above.stop > before:
                return
            self._held.pop()
            if self._held and node.parent.contains(self._held[-1][0]):
                value = self._add(self._held.pop()[1], value)
            self._held.append((node.parent, value))


def most_held(slots: range) -> int:
    """Return how many sums a :class:`RunningSum` holds at most."""
    running, most = RunningSum[int](slots, lambda left, right: left), 0
    for slot in slots:
        running.put(Node(0, slot), slot)
        most = max(most, running.held)
    return most


def total(values: Iterable[tuple[Node, T | None]], add: Callable[[T, T], T]) -> T | None:
    """Return the sum over all slots, given those of the ranks' covers; None if there is no value.

    Args:
        values: nodes with their sums, from left to right.
        add: returns the sum of two values, left and right; may reuse the left one's memory.
    """
    held = [(node, value) for node, value in values if value is not None]
    level = min((node.level for node, _ in held), default=0)
    while len(held) > 1:
        joined: list[tuple[Node, T]] = []
        for node, value in held:
            if node.level > level:
                joined.append((node, value))
            elif joined and joined[-1][0] == node.parent:
                joined[-1] = (node.parent, add(joined[-1][1], value))
            else:
                joined.append((node.parent, value))
        held, level = joined, level + 1
    return held[0][1] if held else None
