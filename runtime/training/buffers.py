"""The rule that keeps buffers (BatchNorm statistics and the like) equal on all ranks and independent of their number.

Every slot starts from the buffers of the step's start. At the step's end they advance by the mean of the real slots'
changes, in one reduction; so the statistics depend on K alone, and fillers leave no trace. Counters, which every slot
advances alike, advance once.

Persistent numbers follow the rule from the start. All other buffers (masks, tables, caches, counters that are not saved) are
mostly constants, which would cost much at every step: they follow it from the step on that first changes one. One process
sees that at once. Of several, small ones are reduced along with those that follow from the start; if there are none, the ranks
agree in the 1st, 2nd, 4th, … step and in every 64th. Until then each rank applies the rule to its own slots, and goes on from
the ranks' mean: a counter is the same on all of them anyway. A buffer that a forward pass makes is rank 0's on every rank.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor, nn

from runtime.distributed.collectives import gather_bytes
from runtime.state.module_buffers import BufferPlace, places_of
from runtime.strategies import Strategy
from runtime.strategies.update import DeviceFlag
from runtime.training.buffer_group import BufferGroup, alike
from runtime.training.buffer_values import addable, advanced, narrow, numbers, wide
from runtime.training.still_buffers import StillBuffer

_SMALL = 1024  # numbers
_STEPS_BETWEEN = 64  # a millisecond or two each, on several processes


def buffer_rule(module: nn.Module, strategy: Strategy, moving: list[str], *, step: int) -> BufferRule:
    """Return the rule for a strategy's ranks; see :class:`BufferRule`."""
    if strategy.world_size == 1:
        return BufferRule(module, moving=moving, step=step)
    return BufferRule(module, dist.all_reduce, lambda told: gather_bytes(told, strategy.device), moving, step=step)


class BufferRule:
    """Applies the rule around the slots of each step.

    Args:
        module: the bare TrainingModule.
        sum_over_ranks: reduces a tensor on the module's device in place. Default: there is one process. Collective.
        exchange: returns every rank's bytes, in rank order. Collective.
        moving: names of buffers that follow the rule besides those that always do; gets those that begin to. Sums are the
            same bits after a resumption only if what is summed together is the same.
        step: how many steps the run has made.
    """

    def __init__(
        self,
        module: nn.Module,
        sum_over_ranks: Callable[[Tensor], object] | None = None,
        exchange: Callable[[bytes], list[bytes]] = lambda told: [told],
        moving: list[str] | None = None,
        *,
        step: int = 0,
    ) -> None:
        self._module, self._exchange = module, exchange
        self._alone = sum_over_ranks is None
        self._sum_over_ranks = sum_over_ranks or (lambda change: None)
        self._known = self._agreed([], [])[0]
        self._moving: list[BufferPlace] = []
        self._groups: list[BufferGroup] = []
        self._likes: list[Tensor] = []  # what all ranks agree to reduce, whatever becomes of a buffer
        self._move([place for place in self._known.values() if _always_moves(place)])
        if self._moving and not self._alone:  # there is a reduction at every step, and a little more costs nothing
            self._move([place for place in self._known.values() if not _always_moves(place) and _is_small(place)])
        self._names = [] if moving is None else moving
        there = {place.name for place in self._moving}
        self._move([self._known[name] for name in self._names if name in self._known and name not in there])
        self._still: dict[str, StillBuffer] = {}
        self._remember()
        self._step, self._first_step = step, step + 1
        self._own_slots = 0

    def begin_step(self) -> None:
        """Remember the buffers as they are."""
        self._step += 1
        self._own_slots = 0
        for still in self._still.values():
            still.begin_step(compare=self._looks)
        if not self._groups:
            return
        with torch.no_grad():
            for group in self._groups:
                group.begin_step()
            self._change.zero_()

    def end_slot(self, *, filler: bool) -> None:
        """Note what a slot changed, and put the buffers back."""
        self._own_slots += not filler
        for still in self._still.values():
            still.end_slot(filler=filler, compare=self._looks)
        if not self._groups:
            return
        with torch.no_grad():
            for group, change_so_far in zip(self._groups, self._changes, strict=True):
                group.end_slot(None if filler else change_so_far)

    def end_step(self, *, real_slots: int, skipped: bool | DeviceFlag) -> None:
        """Advance by the mean change, or not at all where the update was skipped.

        Collective, unless the host knows that it was skipped.
        """
        if skipped is True:
            return
        if self._groups:
            self._sum_over_ranks(self._change)
            self._advance(self._change / real_slots, skipped)
        if self._looks:
            self._follow(real_slots, skipped)
            return
        begun = [still for still in self._still.values() if still.changes is not None]
        for still in begun:
            assert still.changes is not None
            _advance_each([still.place], [still.start], still.changes / self._own_slots, skipped)
        if self._alone and begun:
            self._begin([still.place for still in begun])

    def _move(self, places: list[BufferPlace]) -> None:
        """Let buffers follow the rule at every step."""
        self._moving += places
        self._likes += [torch.empty_like(held, device="meta") for p in places if (held := p.held) is not None]
        pairs: dict[torch.dtype, list[tuple[BufferPlace, Tensor]]] = {}
        for place, like in zip(self._moving, self._likes, strict=True):
            pairs.setdefault(like.dtype, []).append((place, like))
        self._groups = [BufferGroup(*map(list, zip(*group, strict=True))) for group in pairs.values()]
        sizes = [group.numbers for group in self._groups]
        device = self._groups[0].device if self._groups else None
        self._change = torch.zeros(sum(sizes), dtype=_reduced_dtype(self._likes), device=device)
        self._changes = torch.split(self._change, sizes)  # each group's part of what is reduced

    @torch.no_grad()
    def _advance(self, means: Tensor, skipped: bool | DeviceFlag) -> None:
        flag = skipped.on_device.bool() if isinstance(skipped, DeviceFlag) else None
        for group, mean in zip(self._groups, torch.split(means, [g.numbers for g in self._groups]), strict=True):
            group.advance(mean, flag)

    def _begin(self, places: list[BufferPlace]) -> None:
        """Let buffers that were still follow the rule at every step from the next on."""
        self._move(places)
        self._names += [place.name for place in places]
        for place in places:
            del self._still[place.name]

    def _remember(self) -> None:
        """Watch what does not follow the rule; what is watched already goes on as it is."""
        before, self._still = self._still, {}
        moving = {place.name for place in self._moving}
        for name, place in self._known.items():
            if name not in moving and (held := place.held) is not None:
                as_it_was = name in before and alike(held, before[name].start)
                self._still[name] = before[name] if as_it_was else StillBuffer(place)

    @property
    def _looks(self) -> bool:
        """Whether this step compares all values and lets the ranks agree; the same on all of them."""
        step = self._step
        return step & (step - 1) == 0 or step % _STEPS_BETWEEN == 0 or step == self._first_step

    def _follow(self, real_slots: int, skipped: bool | DeviceFlag) -> None:
        """Let what has changed on any rank follow the rule, from one value for all, and share what was made. Collective."""
        still = self._still
        changed = [name for name, buffer in still.items() if buffer.changes is not None]
        self._known, changes = self._agreed(changed, [name for name, buffer in still.items() if buffer.is_private])
        begin = {name: privates for name, privates in changes.items() if name in still and name in self._known}
        if begin:
            parts = [_share(still[name], privates, real_slots) for name, privates in begin.items()]
            sums = torch.cat(parts)
            self._sum_over_ranks(sums)
            places = [still[name].place for name in begin]
            starts = [still[name].agreed if privates else still[name].start for name, privates in begin.items()]
            _advance_each(places, starts, sums, skipped)
            self._begin(places)
        self._remember()

    def _agreed(self, changed: list[str], private: list[str]) -> tuple[dict[str, BufferPlace], dict[str, int]]:
        """Return the buffers that all ranks have alike, and of those that any rank saw change how many had before this step.

        Buffers that have come since the last time are made rank 0's on every rank. Collective.
        """
        there = {place.name: place for place in places_of(self._module) if _follows(place)}
        known = getattr(self, "_known", there)
        new = {name: place for name, place in there.items() if name not in known}
        header = {"all": [[n, *_facts(p)] for n, p in there.items()], "changed": changed, "private": private}
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
        known = {name: place for name, place in there.items() if name in alike}
        seen = {name for each in headers for name in [*each["changed"], *each["private"]]}
        return known, {name: sum(name in each["private"] for each in headers) for name in known if name in seen}

    def _take_over(self, persistent: dict[str, bool], made: bytes) -> None:
        for name, value in load(made).items():
            path, _, key = name.rpartition(".")
            owner = self._module.get_submodule(path)
            held = owner._buffers.get(key)
            device = held.device if held is not None else next(self._module.parameters()).device
            BufferPlace(owner, key, name, persistent[name]).put(value.to(device))


def _share(still: StillBuffer, privates: int, real_slots: int) -> Tensor:
    """Return this rank's share of a buffer's change: of the steps since the ranks agreed, and of the slots of this one."""
    share = torch.zeros(numbers(still.start), dtype=torch.float64, device=still.start.device)
    if privates:
        share += still.went() / privates
    if still.changes is not None:
        share += still.changes / real_slots
    return share


@torch.no_grad()
def _advance_each(places: list[BufferPlace], starts: list[Tensor], means: Tensor, skipped: bool | DeviceFlag) -> None:
    parts = torch.split(means, [numbers(start) for start in starts])
    for place, start, mean in zip(places, starts, parts, strict=True):
        values = advanced(start, mean)
        if isinstance(skipped, DeviceFlag):
            values = torch.where(skipped.on_device.bool(), wide(start), values)
        _put(place, narrow(values, start.dtype))


def _put(place: BufferPlace, value: Tensor) -> None:
    held = place.held
    if held is not None and alike(held, value):
        place.put(value)


def _always_moves(place: BufferPlace) -> bool:
    held = place.held
    return place.persistent and held is not None and not (held.dtype == torch.bool or held.is_complex())


def _is_small(place: BufferPlace) -> bool:
    held = place.held
    return held is not None and held.numel() <= _SMALL


def _follows(place: BufferPlace) -> bool:
    """Tell whether a buffer holds numbers that can be added; packed and sparse ones, and subclasses, are left alone."""
    held = place.held
    plain = held is not None and type(held) is Tensor and held.layout == torch.strided
    return held is not None and plain and held.numel() > 0 and addable(held.dtype)


def _facts(place: BufferPlace) -> list[Any]:
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
