"""Buffers as part of a run's state: finding them, writing to them, and saving those that ``state_dict`` leaves out.

A non-persistent buffer that the forward pass changes belongs to the state, and so does one that the forward pass creates (a
cache). Changes are detected by comparison with the module as it was built.
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
    """Location of a buffer.

    Args:
        owner: the submodule that registers it.
        key: the buffer's name in ``owner``.
        name: the buffer's name in the root module.
        persistent: whether ``state_dict`` includes it.
    """

    owner: nn.Module
    key: str
    name: str
    persistent: bool

    @property
    def held(self) -> Tensor | None:
        """The current buffer; None if there is none."""
        return self.owner._buffers.get(self.key)

    @torch.no_grad()
    def put(self, value: Tensor) -> None:
        """Set the buffer's value; in place where possible, so that it stays the same tensor."""
        held = self.held
        if held is not None and held.shape == value.shape and held.dtype == value.dtype and not overlaps(held):
            held.copy_(value)
        else:
            device = value.device if held is None else held.device
            self.owner.register_buffer(self.key, value.to(device, copy=True), persistent=self.persistent)


def places_of(module: nn.Module) -> list[BufferPlace]:
    """Return the locations of a module's buffers, in the order of ``named_modules``."""
    return [
        BufferPlace(owner, key, f"{prefix}.{key}" if prefix else key, key not in owner._non_persistent_buffers_set)
        for prefix, owner in module.named_modules()
        for key, buffer in owner._buffers.items()
        if buffer is not None
    ]


def overlaps(tensor: Tensor) -> bool:
    """Return whether elements share memory (``expand``), so that the tensor cannot be written to."""
    shape_strides = [(s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1]
    return tensor.numel() > 0 and any(stride == 0 for stride, _ in shape_strides)


@contextmanager
def preserved_buffers(module: nn.Module) -> Iterator[None]:
    """Restore all buffers on exit. A buffer created meanwhile stays, since the module may remember having created it."""
    before = [(place, held, held.detach().clone()) for place in places_of(module) if (held := place.held) is not None]
    try:
        yield
    finally:
        for place, held, value in before:
            place.owner._buffers[place.key] = held
            if not overlaps(held):  # overlapping buffers cannot have been written to
                place.put(value)


class BufferState:
    """The state of a module's buffers that its ``state_dict`` lacks.

    Args:
        module: as built, before its first forward pass.

    Attributes:
        moving: names of buffers that have changed, and since then follow the rule of :mod:`runtime.training.buffers`.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.moving: list[str] = []
        places = places_of(module)
        self._built = {p.name: (held.shape, held.dtype) for p in places if (held := p.held) is not None}
        self._digests = {p.name: _digest(held) for p in places if not p.persistent and (held := p.held) is not None}

    def state(self) -> dict[str, Any]:
        """Return changed non-persistent buffers, and names of persistent ones that are new or have another shape or dtype."""
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
    """Create buffers that a forward pass had created before the save, and give expanded buffers separate memory.

    Args:
        module: submodule into which ``state`` will be loaded.
        prefix: of the submodule's names in the root module.
        state: the submodule's state dict.
        made: names, in the root module, of buffers to create.
    """
    for name in state:
        path, _, key = name.rpartition(".")
        try:
            owner = module.get_submodule(path)
        except AttributeError:
            continue  # reported when the state is loaded
        held = owner._buffers.get(key)
        if held is not None and overlaps(held):
            owner._buffers[key] = held.clone(memory_format=torch.contiguous_format)
        if prefix + name in made:
            _register(owner, key, in_memory(state[name]), persistent=True, like=held)


def load_buffers(module: nn.Module, stored: Mapping[str, Any]) -> None:
    """Load the buffers that a state dict leaves out into a built module.

    Raises:
        KeyError: the module lacks a buffer's submodule.
    """
    for name, value in stored.items():
        path, _, key = name.rpartition(".")
        try:
            owner = module.get_submodule(path)
        except AttributeError:
            raise KeyError(f"the checkpoint has a buffer {name}, but the model has no module {path}") from None
        _register(owner, key, in_memory(value), persistent=False, like=owner._buffers.get(key))


def _register(owner: nn.Module, key: str, value: Tensor, *, persistent: bool, like: Tensor | None) -> None:
    if like is None:
        if owner.__dict__.get(key, "") is None:  # an attribute that the forward pass replaces with a buffer
            del owner.__dict__[key]
        tensors = [*owner.parameters(), *owner.buffers()]
        value = value.to(tensors[0].device, copy=True) if tensors else value
    if like is None and key in owner._buffers:
        persistent = key not in owner._non_persistent_buffers_set
    BufferPlace(owner, key, key, persistent).put(value)


def _digest(buffer: Tensor) -> bytes:
    whole = buffer.detach().cpu().contiguous()
    header = f"{tuple(whole.shape)} {whole.dtype}".encode()
    return sha256(header + whole.reshape(-1).view(torch.uint8).numpy().tobytes()).digest()
