"""The rule that keeps buffers (BatchNorm statistics and the like) equal on all ranks and independent of their number.

Every slot starts from the buffers of the step's start. At the step's end they advance by the mean of the real slots'
changes, in one reduction; so the statistics depend on K alone, and fillers leave no trace. Counters, which every slot
advances alike, advance once.

Persistent numbers follow the rule from the start. All other buffers (masks, tables, caches, counters that are not saved) are
mostly constants, which would cost much at every step: they are looked at in the 1st, 2nd, 4th, 8th, … step, and from the step
on that changes one it follows the rule. A buffer that a forward pass makes is rank 0's on every rank.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor, nn

from runtime.processes.control import gather_bytes
from runtime.strategies import DeviceFlag, Strategy
from runtime.training.buffer_values import addable, advanced, base, change, narrow, numbers, same_bits, wide
from runtime.training.held_buffers import Place, places_of


def buffer_rule(module: nn.Module, strategy: Strategy, moving: list[str]) -> BufferRule:
    """Return the rule for a strategy's ranks; see :class:`BufferRule`."""
    if strategy.world_size == 1:
        return BufferRule(module, lambda change: None, moving=moving)
    return BufferRule(module, dist.all_reduce, lambda told: gather_bytes(told, strategy.device), moving)


class BufferRule:
    """Applies the rule around the slots of each step.

    Args:
        module: the bare TrainingModule.
        sum_over_ranks: reduces a tensor on the module's device in place. Collective.
        exchange: returns every rank's bytes, in rank order. Collective.
        moving: names of buffers that follow the rule besides those that always do; gets those that begin to. Sums are the
            same bits after a resumption only if what is summed together is the same.
    """

    def __init__(
        self,
        module: nn.Module,
        sum_over_ranks: Callable[[Tensor], object],
        exchange: Callable[[bytes], list[bytes]] = lambda told: [told],
        moving: list[str] | None = None,
    ) -> None:
        self._module, self._sum_over_ranks, self._exchange = module, sum_over_ranks, exchange
        self._known = self._agreed({})[0]
        self._moving: list[Place] = []
        self._likes: list[Tensor] = []  # what all ranks agree to reduce, whatever becomes of a buffer
        self._move([place for place in self._known.values() if _always_moves(place)])
        self._names = [] if moving is None else moving
        self._move([self._known[name] for name in self._names if name in self._known])
        self._steps = 0
        self._start: list[Tensor] = []
        self._base: list[Tensor] = []
        self._change = torch.zeros(())
        self._watched: list[tuple[Place, Tensor]] = []
        self._seen: dict[str, Tensor] = {}

    def begin_step(self) -> None:
        """Remember the buffers as they are."""
        self._steps += 1
        if self._looks:
            moving = {place.name for place in self._moving}
            still = [place for place in self._known.values() if place.name not in moving]
            self._watched = [(place, held.detach().clone()) for place in still if (held := place.held) is not None]
        if not self._moving:
            return
        self._start = [_copied(place, like) for place, like in zip(self._moving, self._likes, strict=True)]
        self._base = [base(wide(start)) for start in self._start]
        size = sum(numbers(start) for start in self._start)
        self._change = torch.zeros(size, dtype=self._dtype, device=self._start[0].device)

    def end_slot(self, *, filler: bool) -> None:
        """Note what a slot changed, and put the buffers back."""
        if self._watched:
            self._watch(filler=filler)
        if not self._moving:
            return
        with torch.no_grad():
            if not filler:
                each = zip(self._moving, self._start, self._base, strict=True)
                self._change += torch.cat([_changed(place, start, b).to(self._dtype) for place, start, b in each])
            for place, start in zip(self._moving, self._start, strict=True):
                _put(place, start)

    def end_step(self, *, real_slots: int, skipped: bool | DeviceFlag) -> None:
        """Advance by the mean change, or not at all where the update was skipped.

        Collective, unless the host knows that it was skipped.
        """
        watched, seen = {place.name: start for place, start in self._watched}, self._seen
        self._watched, self._seen = [], {}
        if skipped is True:
            return
        if self._moving:
            self._sum_over_ranks(self._change)
            _advance(self._moving, self._start, self._change / real_slots, skipped)
        if self._looks:
            self._follow(watched, seen, real_slots, skipped)

    def _watch(self, *, filler: bool) -> None:
        for place, start in self._watched:
            held = place.held
            if held is None or not _alike(held, start) or same_bits(held, start):
                continue
            if not filler:
                its = change(held, base(wide(start))).to(torch.float64)
                self._seen[place.name] = its + self._seen[place.name] if place.name in self._seen else its
            place.put(start)

    def _move(self, places: list[Place]) -> None:
        """Let buffers follow the rule at every step."""
        self._moving += places
        self._likes += [torch.empty_like(held, device="meta") for p in places if (held := p.held) is not None]
        self._dtype = _reduced_dtype(self._likes)

    @property
    def _looks(self) -> bool:
        """Whether this step looks at all buffers: the 1st, 2nd, 4th, … of this process do."""
        return self._steps & (self._steps - 1) == 0

    def _follow(
        self, watched: dict[str, Tensor], seen: dict[str, Tensor], real_slots: int, skipped: bool | DeviceFlag
    ) -> None:
        """Let what was seen to change on any rank follow the rule from this step on, and share what was made. Collective."""
        known, changed = self._agreed(seen)
        begin = [known[name] for name in watched if name in changed and name in known]
        if begin:
            starts = [watched[place.name] for place in begin]
            nothing = [torch.zeros(numbers(start), dtype=torch.float64, device=start.device) for start in starts]
            sums = torch.cat([seen.get(place.name, none) for place, none in zip(begin, nothing, strict=True)])
            self._sum_over_ranks(sums)
            _advance(begin, starts, sums / real_slots, skipped)
            self._move(begin)
            self._names += [place.name for place in begin]
        self._known = known

    def _agreed(self, seen: dict[str, Tensor]) -> tuple[dict[str, Place], set[str]]:
        """Return the buffers that all ranks have alike, and which of them any rank saw change. Collective.

        Buffers that have come since the last time are made rank 0's on every rank.
        """
        there = {place.name: place for place in places_of(self._module) if _follows(place)}
        known = getattr(self, "_known", there)
        new = {name: place for name, place in there.items() if name not in known}
        header = {"all": [[n, *_facts(p)] for n, p in there.items()], "changed": list(seen)}
        header |= {"new": {name: place.persistent for name, place in new.items()}}
        text = json.dumps(header).encode()
        made = save({name: p.held.detach().cpu().contiguous() for name, p in new.items() if p.held is not None})
        told = self._exchange(len(text).to_bytes(8, "little") + text + made)
        headers = [json.loads(each[8 : 8 + int.from_bytes(each[:8], "little")]) for each in told]
        if len(told) > 1:
            self._take_over(headers[0]["new"], told[0][8 + int.from_bytes(told[0][:8], "little") :])
            there = {place.name: place for place in places_of(self._module) if _follows(place)}
        mine = {json.dumps(entry) for entry in headers[0]["all"]}
        for other in headers[1:]:
            mine &= {json.dumps(entry) for entry in other["all"]}
        alike = {json.loads(entry)[0] for entry in mine} | set(headers[0]["new"])
        changed = {name for each in headers for name in each["changed"]}
        return {name: place for name, place in there.items() if name in alike}, changed

    def _take_over(self, persistent: dict[str, bool], made: bytes) -> None:
        for name, value in load(made).items():
            path, _, key = name.rpartition(".")
            owner = self._module.get_submodule(path)
            held = owner._buffers.get(key)
            device = held.device if held is not None else next(self._module.parameters()).device
            Place(owner, key, name, persistent[name]).put(value.to(device))


@torch.no_grad()
def _advance(places: list[Place], starts: list[Tensor], means: Tensor, skipped: bool | DeviceFlag) -> None:
    parts = torch.split(means, [numbers(start) for start in starts])
    for place, start, mean in zip(places, starts, parts, strict=True):
        values = advanced(start, mean)
        if isinstance(skipped, DeviceFlag):
            values = torch.where(skipped.on_device.bool(), wide(start), values)
        _put(place, narrow(values, start.dtype))


def _copied(place: Place, like: Tensor) -> Tensor:
    """Return a buffer's copy; zeros where a forward pass has put something of another shape in its place."""
    held = place.held
    if held is not None and _alike(held, like):
        return held.detach().clone()
    return torch.zeros_like(like, device=next(iter(place.owner.parameters()), torch.zeros(())).device)


def _changed(place: Place, start: Tensor, its_base: Tensor) -> Tensor:
    held = place.held
    return change(held if held is not None and _alike(held, start) else start, its_base)


def _put(place: Place, value: Tensor) -> None:
    held = place.held
    if held is not None and _alike(held, value):
        place.put(value)


def _alike(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and first.dtype == second.dtype


def _always_moves(place: Place) -> bool:
    held = place.held
    return place.persistent and held is not None and not (held.dtype == torch.bool or held.is_complex())


def _follows(place: Place) -> bool:
    """Tell whether a buffer holds numbers that can be added; packed and sparse ones, and subclasses, are left alone."""
    held = place.held
    plain = held is not None and type(held) is Tensor and held.layout == torch.strided
    return held is not None and plain and held.numel() > 0 and addable(held.dtype)


def _facts(place: Place) -> list[Any]:
    held = place.held
    assert held is not None
    return [str(held.dtype), list(held.shape)]


def _reduced_dtype(likes: list[Tensor]) -> torch.dtype:
    """Return what changes are added up in: those of a counter fit into float32, and lists of integers may not."""
    exact = any(
        b.dtype in (torch.float64, torch.complex128) or not (b.is_floating_point() or b.is_complex() or b.ndim == 0)
        for b in likes
    )
    return torch.float64 if exact else torch.float32
