"""The rule that keeps buffers (BatchNorm statistics and the like) equal on all ranks and independent of the world size.

Every slot starts from the buffers at the start of the step. At the end of the step they change by the mean of the real slots'
changes, in one reduction; so the statistics depend only on K, and fillers have no effect. Counters, which every slot
increments equally, are incremented once.

Persistent numeric buffers follow the rule from the start. All others (masks, tables, caches, counters that are not saved) are
mostly constants, for which a reduction at every step would be expensive: they follow the rule from the step that first changes
them. A single process detects that at once. With several processes, small ones are reduced along with those that follow from
the start; if there are none, the ranks compare in steps 1, 2, 4, … and in every 64th. Until then each rank applies the rule to
its own slots, and then continues from the ranks' mean: a counter is equal on all of them anyway. A buffer created by a forward
pass gets rank 0's value on every rank.
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
    return BufferRule(
        module, dist.all_reduce, lambda payload: gather_bytes(payload, strategy.device), moving, step=step
    )


class BufferRule:
    """Applies the rule around the slots of each step.

    Args:
        module: the unwrapped TrainingModule.
        sum_over_ranks: reduces a tensor on the module's device in place. Default: a single process. Collective.
        exchange: returns every rank's bytes, in rank order. Collective.
        moving: names of buffers that follow the rule in addition to those that always do; extended in place. Sums are bitwise
            equal after a resumption only if the same buffers are summed together.
        step: number of steps made so far.
    """

    def __init__(
        self,
        module: nn.Module,
        sum_over_ranks: Callable[[Tensor], object] | None = None,
        exchange: Callable[[bytes], list[bytes]] = lambda payload: [payload],
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
        self._likes: list[Tensor] = []  # the shapes that all ranks reduce, even if a buffer is replaced
        self._move([place for place in self._known.values() if _always_moves(place)])
        if self._moving and not self._alone:  # there is a reduction at every step anyway
            self._move([place for place in self._known.values() if not _always_moves(place) and _is_small(place)])
        self._names = [] if moving is None else moving
        moved = {place.name for place in self._moving}
        self._move([self._known[name] for name in self._names if name in self._known and name not in moved])
        self._still: dict[str, StillBuffer] = {}
        self._watch_others()
        self._step, self._first_step = step, step + 1
        self._own_slots = 0

    def begin_step(self) -> None:
        """Save the buffers' values."""
        self._step += 1
        self._own_slots = 0
        for still in self._still.values():
            still.begin_step(compare=self._compares)
        if not self._groups:
            return
        with torch.no_grad():
            for group in self._groups:
                group.begin_step()
            self._change.zero_()

    def end_slot(self, *, filler: bool) -> None:
        """Record a slot's changes, and restore the buffers."""
        self._own_slots += not filler
        for still in self._still.values():
            still.end_slot(filler=filler, compare=self._compares)
        if not self._groups:
            return
        with torch.no_grad():
            for group, change_so_far in zip(self._groups, self._changes, strict=True):
                group.end_slot(None if filler else change_so_far)

    def end_step(self, *, real_slots: int, skipped: bool | DeviceFlag) -> None:
        """Apply the mean change, or none if the update was skipped.

        Collective, unless the host knows that it was skipped.
        """
        if skipped is True:
            return
        if self._groups:
            self._sum_over_ranks(self._change)
            self._advance(self._change / real_slots, skipped)
        if self._compares:
            self._follow(real_slots, skipped)
            return
        changed = [still for still in self._still.values() if still.changes is not None]
        for still in changed:
            assert still.changes is not None
            _advance_each([still.place], [still.start], still.changes / self._own_slots, skipped)
        if self._alone and changed:
            self._begin([still.place for still in changed])

    def _move(self, places: list[BufferPlace]) -> None:
        """Apply the rule to buffers at every step."""
        self._moving += places
        self._likes += [torch.empty_like(held, device="meta") for p in places if (held := p.held) is not None]
        pairs: dict[torch.dtype, list[tuple[BufferPlace, Tensor]]] = {}
        for place, like in zip(self._moving, self._likes, strict=True):
            pairs.setdefault(like.dtype, []).append((place, like))
        self._groups = [BufferGroup(*map(list, zip(*group, strict=True))) for group in pairs.values()]
        sizes = [group.numbers for group in self._groups]
        device = self._groups[0].device if self._groups else None
        self._change = torch.zeros(sum(sizes), dtype=_reduced_dtype(self._likes), device=device)
        self._changes = torch.split(self._change, sizes)  # each group's part of the reduced tensor

    @torch.no_grad()
    def _advance(self, means: Tensor, skipped: bool | DeviceFlag) -> None:
        flag = skipped.on_device.bool() if isinstance(skipped, DeviceFlag) else None
        for group, mean in zip(self._groups, torch.split(means, [g.numbers for g in self._groups]), strict=True):
            group.advance(mean, flag)

    def _begin(self, places: list[BufferPlace]) -> None:
        """Apply the rule to buffers that did not change before, at every step from the next on."""
        self._move(places)
        self._names += [place.name for place in places]
        for place in places:
            del self._still[place.name]

    def _watch_others(self) -> None:
        """Watch the buffers that do not follow the rule yet; those already watched keep their state."""
        before, self._still = self._still, {}
        moving = {place.name for place in self._moving}
        for name, place in self._known.items():
            if name not in moving and (held := place.held) is not None:
                same_kind = name in before and alike(held, before[name].start)
                self._still[name] = before[name] if same_kind else StillBuffer(place)

    @property
    def _compares(self) -> bool:
        """Whether this step compares all values, also between ranks; equal on all of them."""
        step = self._step
        return step & (step - 1) == 0 or step % _STEPS_BETWEEN == 0 or step == self._first_step

    def _follow(self, real_slots: int, skipped: bool | DeviceFlag) -> None:
        """Apply the rule to buffers that changed on any rank, from a common value, and broadcast new buffers. Collective."""
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
        self._watch_others()

    def _agreed(self, changed: list[str], private: list[str]) -> tuple[dict[str, BufferPlace], dict[str, int]]:
        """Return the buffers common to all ranks, and for those that changed on any rank, on how many before this step.

        Buffers created since the last call get rank 0's values on every rank. Collective.
        """
        present = {place.name: place for place in places_of(self._module) if _follows(place)}
        known = getattr(self, "_known", present)
        new = {name: place for name, place in present.items() if name not in known}
        header = {"all": [[n, *_signature(p)] for n, p in present.items()], "changed": changed, "private": private}
        header |= {"new": {name: place.persistent for name, place in new.items()}}
        text = json.dumps(header).encode()
        values = save({name: p.held.detach().cpu().contiguous() for name, p in new.items() if p.held is not None})
        payloads = self._exchange(len(text).to_bytes(8, "little") + text + values)
        headers = [json.loads(each[8 : 8 + int.from_bytes(each[:8], "little")]) for each in payloads]
        if len(payloads) > 1:
            self._create(headers[0]["new"], payloads[0][8 + int.from_bytes(payloads[0][:8], "little") :])
            present = {place.name: place for place in places_of(self._module) if _follows(place)}
        common = {json.dumps(entry) for entry in headers[0]["all"]}
        for other in headers[1:]:
            common &= {json.dumps(entry) for entry in other["all"]}
        names = {json.loads(entry)[0] for entry in common} | set(headers[0]["new"])
        known = {name: place for name, place in present.items() if name in names}
        seen = {name for each in headers for name in [*each["changed"], *each["private"]]}
        return known, {name: sum(name in each["private"] for each in headers) for name in known if name in seen}

    def _create(self, persistent: dict[str, bool], values: bytes) -> None:
        """Create rank 0's new buffers."""
        for name, value in load(values).items():
            path, _, key = name.rpartition(".")
            owner = self._module.get_submodule(path)
            held = owner._buffers.get(key)
            device = held.device if held is not None else next(self._module.parameters()).device
            BufferPlace(owner, key, name, persistent[name]).put(value.to(device))


def _share(still: StillBuffer, privates: int, real_slots: int) -> Tensor:
    """Return this rank's share of a buffer's change: in the steps since the ranks agreed, and in the slots of this step."""
    share = torch.zeros(numbers(still.start), dtype=torch.float64, device=still.start.device)
    if privates:
        share += still.earlier_change() / privates
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
    """Whether the rule applies to a buffer: it can be added; not for packed and sparse ones, and Tensor subclasses."""
    held = place.held
    plain = held is not None and type(held) is Tensor and held.layout == torch.strided
    return held is not None and plain and held.numel() > 0 and addable(held.dtype)


def _signature(place: BufferPlace) -> list[Any]:
    held = place.held
    assert held is not None
    return [str(held.dtype), list(held.shape)]


def _reduced_dtype(likes: list[Tensor]) -> torch.dtype:
    """Return the dtype in which changes are summed: a counter's fit into float32, those of integer arrays may not."""
    exact = any(
        b.dtype in (torch.float64, torch.complex128) or not (b.is_floating_point() or b.is_complex() or b.ndim == 0)
        for b in likes
    )
    return torch.float64 if exact else torch.float32
