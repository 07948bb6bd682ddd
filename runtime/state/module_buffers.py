"""Buffers as part of a run's state: where they are, how they are written to, and those that ``state_dict`` leaves out.

A buffer that is not persistent and changes in the forward pass belongs to the state all the same, and so does one that the
forward pass makes (a cache). Which of them changed is told by comparing with the module as it was built.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from runtime.state.shards import in_memory


class BufferPlace(NamedTuple):
    """Where a module keeps a buffer.

    Args:
        owner: the module.
        key: the buffer's name in it.
        name: the buffer's name in the whole.
        persistent: whether ``state_dict`` has it.
    """

    owner: nn.Module
    key: str
    name: str
    persistent: bool

    @property
    def held(self) -> Tensor | None:
        """The buffer, None where there is none now."""
        return self.owner._buffers.get(self.key)

    @torch.no_grad()
    def put(self, value: Tensor) -> None:
        """Let the buffer hold a value; in place, so that it stays the same tensor, where that can be."""
        held = self.held
        if held is not None and held.shape == value.shape and held.dtype == value.dtype and not overlaps(held):
            held.copy_(value)
        else:
            device = value.device if held is None else held.device
            self.owner.register_buffer(self.key, value.to(device, copy=True), persistent=self.persistent)


def places_of(module: nn.Module) -> list[BufferPlace]:
    """Return where a module keeps buffers, in the order of its parts."""
    return [
        BufferPlace(owner, key, f"{prefix}.{key}" if prefix else key, key not in owner._non_persistent_buffers_set)
        for prefix, owner in module.named_modules()
        for key, buffer in owner._buffers.items()
        if buffer is not None
    ]


def overlaps(tensor: Tensor) -> bool:
    """Tell whether several elements share their memory (``expand``), so that the tensor cannot be written to."""
    shape_strides = [(s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1]
    return tensor.numel() > 0 and any(stride == 0 for stride, _ in shape_strides)


@contextmanager
def preserved_buffers(module: nn.Module) -> Iterator[None]:
    """Put all buffers back as they were. One that is made meanwhile stays, since the module may remember having made it."""
    before = [(place, held, held.detach().clone()) for place in places_of(module) if (held := place.held) is not None]
    try:
        yield
    finally:
        for place, held, value in before:
            place.owner._buffers[place.key] = held
            if not overlaps(held):  # which nothing can have written to
                place.put(value)


class BufferState:
    """What of a module's buffers belongs in a checkpoint besides its ``state_dict``.

    Args:
        module: as it was built, before its first forward pass.

    Attributes:
        moving: names of buffers that were seen to change and follow the rule of :mod:`runtime.training.buffers` since.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.moving: list[str] = []
        places = places_of(module)
        self._built = {p.name: (held.shape, held.dtype) for p in places if (held := p.held) is not None}
        self._digests = {p.name: _digest(held) for p in places if not p.persistent and (held := p.held) is not None}

    def state(self) -> dict[str, Any]:
        """Return the buffers that are not persistent and changed, and the names of persistent ones that were not built so."""
        changed, made = {}, []
        for place in places_of(self._module):
            held = place.held
            assert held is not None
            if place.persistent:
                if self._built.get(place.name) != (held.shape, held.dtype):
                    made.append(place.name)
            elif self._digests.get(place.name) != _digest(held):
                changed[place.name] = held.detach()
        return {"changed": changed, "made": made, "moving": list(self.moving)}


def make_room(module: nn.Module, prefix: str, state: Mapping[str, Any], made: Sequence[str]) -> None:
    """Give a built module's part the buffers that a forward pass had made, and memory of their own to those that are expanded.

    Args:
        module: that ``state`` is to be loaded into.
        prefix: of its names in the whole.
        state: its state dict.
        made: names of buffers in the whole.
    """
    for name in state:
        path, _, key = name.rpartition(".")
        try:
            owner = module.get_submodule(path)
        except AttributeError:
            continue  # told when the state is loaded
        held = owner._buffers.get(key)
        if held is not None and overlaps(held):
            owner._buffers[key] = held.clone(memory_format=torch.contiguous_format)
        if prefix + name in made:
            _register(owner, key, in_memory(state[name]), persistent=True, like=held)


def load_buffers(module: nn.Module, stored: Mapping[str, Any]) -> None:
    """Give a built module the buffers that its state dict leaves out.

    Raises:
        KeyError: it has no such part.
    """
    for name, value in stored.items():
        path, _, key = name.rpartition(".")
        try:
            owner = module.get_submodule(path)
        except AttributeError:
            raise KeyError(f"the checkpoint has a buffer {name}, and there is no module {path}") from None
        _register(owner, key, in_memory(value), persistent=False, like=owner._buffers.get(key))


def _register(owner: nn.Module, key: str, value: Tensor, *, persistent: bool, like: Tensor | None) -> None:
    if like is None:
        if owner.__dict__.get(key, "") is None:  # what the forward pass finds, and makes a buffer of
            del owner.__dict__[key]
        tensors = [*owner.parameters(), *owner.buffers()]
        value = value.to(tensors[0].device, copy=True) if tensors else value
    if like is None and key in owner._buffers:
        persistent = key not in owner._non_persistent_buffers_set
    BufferPlace(owner, key, key, persistent).put(value)


def _digest(buffer: Tensor) -> bytes:
    whole = buffer.detach().cpu().contiguous()
    facts = f"{tuple(whole.shape)} {whole.dtype}".encode()
    return sha256(facts + whole.reshape(-1).view(torch.uint8).numpy().tobytes()).digest()
