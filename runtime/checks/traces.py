"""A module as it was before it was tried out."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from runtime.training.held_buffers import overlaps, preserved_buffers

_OF_MODULES = frozenset(vars(nn.Module())) - {"training"}
_CODE = (FunctionType, MethodType, BuiltinFunctionType, ModuleType, partial)
Restore = Callable[[], object]


@contextmanager
def left_as_it_was(module: nn.Module, *, training: bool) -> Iterator[None]:
    """Set a mode; afterwards put back modes, buffers and what a module and its parts keep in attributes.

    Attributes of plain data, tensors, generators and objects of these are put back, in place: others may hold them as well.
    """
    parts = list(module.modules())
    before = [_own(part) for part in parts]
    seen: set[int] = set()
    restoring = [restore for attributes in before for restore in _restoring(attributes, seen)]
    module.train(training)
    try:
        with preserved_buffers(module):
            yield
    finally:
        for part, attributes in zip(parts, before, strict=True):
            for key in _own(part).keys() - attributes.keys():
                delattr(part, key)
            vars(part).update(attributes)  # 'training' among them
        for restore in restoring:
            restore()


def _own(part: nn.Module) -> dict[str, Any]:
    """Return a module's attributes, torch's own tables excepted."""
    return {key: value for key, value in vars(part).items() if key not in _OF_MODULES}


def _restoring(value: Any, seen: set[int]) -> Iterator[Restore]:
    """Yield what puts a value and all within it back as they are now."""
    if id(value) in seen or isinstance(value, (nn.Module, nn.Parameter, type, *_CODE)):
        return
    seen.add(id(value))
    generator = _restoring_generator(value)
    if generator is not None:
        yield generator
    elif isinstance(value, Tensor):
        if value.is_leaf and not overlaps(value):
            yield partial(value.detach().copy_, value.detach().clone())
    elif isinstance(value, np.ndarray):
        yield partial(np.copyto, value, value.copy())
    elif isinstance(value, dict):
        yield partial(_refill, value, value.update, dict(value))
        for inner in value.values():
            yield from _restoring(inner, seen)
    elif isinstance(value, list | deque | set):
        yield partial(_refill, value, value.update if isinstance(value, set) else value.extend, list(value))
        for inner in value:
            yield from _restoring(inner, seen)
    elif isinstance(value, tuple):
        for inner in value:
            yield from _restoring(inner, seen)
    elif hasattr(value, "__dict__"):
        yield from _restoring(vars(value), seen)


def _refill(collection: Any, fill: Callable[[Any], object], kept: Any) -> None:
    collection.clear()
    fill(kept)


def _restoring_generator(value: Any) -> Restore | None:
    if isinstance(value, torch.Generator):
        return partial(value.set_state, value.get_state())
    if isinstance(value, random.Random):
        return partial(value.setstate, value.getstate())
    if isinstance(value, np.random.Generator):
        return partial(setattr, value.bit_generator, "state", value.bit_generator.state)
    if isinstance(value, np.random.RandomState):
        return partial(value.set_state, value.get_state())
    return None
