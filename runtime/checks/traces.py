"""A module as it was before it was tried out."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from runtime.training.held_buffers import preserved_buffers

_PLAIN = (int, float, str, bool, tuple, list, dict, set, type(None))


@contextmanager
def left_as_it_was(module: nn.Module, *, training: bool) -> Iterator[None]:
    """Set a mode; afterwards put back modes, buffers, plain attributes (counters) and generators of a module and its parts."""
    parts = list(module.modules())
    plain = [{key: copy.deepcopy(value) for key, value in _own(part).items()} for part in parts]
    drawn = [
        (value, value.get_state())
        for part in parts
        for value in vars(part).values()
        if isinstance(value, torch.Generator)
    ]
    module.train(training)
    try:
        with preserved_buffers(module):
            yield
    finally:
        for part, attributes in zip(parts, plain, strict=True):
            for key in _own(part).keys() - attributes.keys():
                delattr(part, key)
            vars(part).update(attributes)  # 'training' among them
        for generator, state in drawn:
            generator.set_state(state)


def _own(part: nn.Module) -> dict[str, Any]:
    """Return a module's attributes of plain data, torch's own tables excepted."""
    return {
        key: value for key, value in vars(part).items() if _is_plain(value) and (key == "training" or key[0] != "_")
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_plain(inner) for inner in value.values())
    if isinstance(value, list | tuple | set):
        return all(_is_plain(inner) for inner in value)
    return isinstance(value, _PLAIN)
