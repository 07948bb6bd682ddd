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
from runtime.distributed.slot_reduction import SlotReduction
from runtime.distributed.slot_tree import Node, RunningSum, cover, total
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
    return BufferRule(
        module,
        strategy.slot_reduction,
        lambda payload: gather_bytes(payload, strategy.device),
        moving,
        step=step,
    )


class BufferRule:
    """Applies the rule around the slots of each step.

    Args:
        module: the unwrapped TrainingModule.
        reduction: sums changes over the slots.
        exchange: returns every rank's bytes, in rank order. Collective.
        moving: names of buffers that follow the rule in addition to those that always do; extended in place. Sums are bitwise
            equal after a resumption only if the same buffers are summed together.
        step: number of steps made so far.
    """

    def __init__(
        self,
        module: nn.Module,
        reduction: SlotReduction,
        exchange: Callable[[bytes], list[bytes]] = lambda payload: [payload],
        moving: list[str] | None = None,
        *,
        step: int = 0,
    ) -> None:
        self._module, self._reduction, self._exchange = module, reduction, exchange
        self._sums = RunningSum[Tensor](reduction.own_slots, Tensor.add_)
        self._known = self._agreed([], [])[0]
        self._still: dict[str, StillBuffer] = {}
        self._moving: list[BufferPlace] = []
        self._groups: list[BufferGroup] = []
        self._likes: list[Tensor] = []  # the shapes that all ranks reduce, even if a buffer is replaced
        self._move([place for place in self._known.values() if _always_moves(place)])
        if self._moving and (reduction.ordered or not reduction.alone):  # there is a reduction at every step anyway
            self._move([place for place in self._known.values() if not _always_moves(place) and _is_small(place)])
        self._names = [] if moving is None else moving
        moved = {place.name for place in self._moving}
        self._move([self._known[name] for name in self._names if name in self._known and name not in moved])
        self._watch_others()
        self._step, self._first_step = step, step + 1
        self._own_slots = 0

    def begin_step(self) -> None:
        """Save the buffers' values."""
        self._step += 1
        self._own_slots = 0
        for still in self._still.values():
            still.begin_step(compare=self._compares)
        with torch.no_grad():
            for group in self._groups:
                group.begin_step()

    def end_slot(self, slot: int) -> None:
        """Record a slot's changes, and restore the buffers.

        Args:
            slot: number in the step; negative for a filler, whose changes are dropped.
        """
        self._own_slots += slot >= 0
        for still in self._still.values():
            still.end_slot(slot, compare=self._compares)
        if not self._groups and not self._tells:
            return
        with torch.no_grad():
            if slot >= 0:
                self._sums.put(Node(0, slot), self._slot_change())
            for group in self._groups:
                group.restore()

    def end_step(self, *, real_slots: int, skipped: bool | DeviceFlag) -> None:
        """Apply the mean change, or none if the update was skipped.

        Collective, unless the host knows that it was skipped.
        """
        if skipped is True:
            self._sums.take()
            return
        follows = self._compares
        if self._groups or self._tells:
            change = self._reduction.sum(self._sums.take(), self._change)
            if self._tells:
                follows = change[-1].item() != 0
                change = change[:-1]
            self._advance(change / real_slots, skipped)
        if follows:
            self._follow(real_slots, skipped)
            return
        changed = [still for still in self._still.values() if still.changed]
        for still in changed:
            own = total(zip(cover(self._reduction.own_slots), still.changes.take(), strict=True), Tensor.add_)
            assert own is not None
            _advance_each([still.place], [still.start], own / self._own_slots, skipped)
        if self._reduction.alone and changed:
            self._begin([still.place for still in changed])

    @property
    def _tells(self) -> bool:
        """Whether ranks tell each other in every step if a buffer began to change, so that the order of sums is always kept."""
        return self._reduction.ordered and not self._reduction.alone and bool(self._still)

    def _slot_change(self) -> Tensor:
        """Return the change of all moving buffers in a slot, and whether another one changed."""
        parts = [group.change().to(self._change.dtype) for group in self._groups]
        if self._tells:
            changed = any(still.changed or still.is_private for still in self._still.values())
            parts.append(self._change.new_full((1,), float(changed)))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _move(self, places: list[BufferPlace]) -> None:
        """Apply the rule to buffers at every step."""
        self._moving += places
        self._likes += [torch.empty_like(held, device="meta") for p in places if (held := p.held) is not None]
        pairs: dict[torch.dtype, list[tuple[BufferPlace, Tensor]]] = {}
        for place, like in zip(self._moving, self._likes, strict=True):
            pairs.setdefault(like.dtype, []).append((place, like))
        self._groups = [BufferGroup(*map(list, zip(*group, strict=True))) for group in pairs.values()]
        self._size_change()

    def _size_change(self) -> None:
        """Allocate what :meth:`SlotReduction.sum` takes shape, dtype and device from."""
        held = next(iter(self._still.values())).start if self._still else torch.empty(0)
        device = self._groups[0].device if self._groups else held.device
        numbers = sum(group.numbers for group in self._groups) + self._tells
        self._change = torch.empty(numbers, dtype=_reduced_dtype(self._likes), device=device)

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
        self._size_change()

    def _watch_others(self) -> None:
        """Watch the buffers that do not follow the rule yet; those already watched keep their state."""
        before, self._still = self._still, {}
        moving = {place.name for place in self._moving}
        for name, place in self._known.items():
            if name not in moving and (held := place.held) is not None:
                same_kind = name in before and alike(held, before[name].start)
                self._still[name] = before[name] if same_kind else StillBuffer(place, self._reduction.own_slots)
        self._size_change()

    @property
    def _compares(self) -> bool:
        """Whether this step compares all values, also between ranks; equal on all of them."""
        step = self._step
        return step & (step - 1) == 0 or step % _STEPS_BETWEEN == 0 or step == self._first_step

    def _follow(self, real_slots: int, skipped: bool | DeviceFlag) -> None:
        """Apply the rule to buffers that changed on any rank, from a common value, and broadcast new buffers. Collective."""
        still = self._still
        changed = [name for name, buffer in still.items() if buffer.changed]
        self._known, changes = self._agreed(changed, [name for name, buffer in still.items() if buffer.is_private])
        begin = {name: privates for name, privates in changes.items() if name in still and name in self._known}
        if begin:
            means = self._mean_changes([still[name] for name in begin], real_slots)
            if any(begin.values()):
                earlier = torch.cat([_earlier(still[name], privates) for name, privates in begin.items()])
                if not self._reduction.alone:
                    dist.all_reduce(earlier)
                means += earlier
            places = [still[name].place for name in begin]
            starts = [still[name].agreed if privates else still[name].start for name, privates in begin.items()]
            _advance_each(places, starts, means, skipped)
            self._begin(places)
        self._watch_others()

    def _mean_changes(self, still: list[StillBuffer], real_slots: int) -> Tensor:
        """Return the mean change of each buffer in the slots of this step, one after another, in float64. Collective."""
        sizes, device = [numbers(buffer.start) for buffer in still], still[0].start.device
        nodes = zip(*(buffer.changes.take() for buffer in still), strict=True)
        values = [
            torch.cat(
                [
                    torch.full((size,), -0.0, dtype=torch.float64, device=device) if value is None else value
                    for size, value in zip(sizes, node, strict=True)
                ]
            )
            for node in nodes
        ]
        return self._reduction.sum(values, torch.empty(sum(sizes), dtype=torch.float64, device=device)) / real_slots

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


def _earlier(still: StillBuffer, privates: int) -> Tensor:
    """Return this rank's share of a buffer's change in the steps since the ranks agreed."""
    if not privates:
        return torch.zeros(numbers(still.start), dtype=torch.float64, device=still.start.device)
    return still.earlier_change() / privates


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
