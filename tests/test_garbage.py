"""Garbage is collected at fixed steps, and the collector is as it was afterwards."""

from __future__ import annotations

import gc
import weakref

import pytest

from runtime.training.garbage import GarbageCollection

pytestmark = pytest.mark.single


class Node:
    def __init__(self) -> None:
        self.itself = self


def cycle() -> weakref.ref[Node]:
    return weakref.ref(Node())


def test_cycles_are_collected_at_every_fiftieth_step_and_not_before() -> None:
    with GarbageCollection() as garbage:
        node = cycle()
        for step in range(1, 50):
            garbage.after_step(step)
        assert len([[i] for i in range(5000)]) == 5000  # enough allocations for the collector's own count
        assert node() is not None
        garbage.after_step(50)
        assert node() is None


def test_the_collector_works_by_itself_in_a_pause_and_afterwards() -> None:
    garbage = GarbageCollection()
    with garbage:
        assert not gc.isenabled()
        with garbage.paused():
            assert gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_a_collector_that_the_user_turned_off_stays_off() -> None:
    gc.disable()
    try:
        with GarbageCollection() as garbage, garbage.paused():
            assert not gc.isenabled()
        assert not gc.isenabled()
    finally:
        gc.enable()
