"""Restore a module's state after trial passes."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from runtime.state.module_buffers import overlaps, preserved_buffers

_OF_MODULES = frozenset(vars(nn.Module())) - {"training"}
_OF_WRAPPERS = ("_fsdp", "_ds", "ds_", "_external")
_LIBRARIES = ("torch", "accelerate", "deepspeed")
_CODE = (FunctionType, MethodType, BuiltinFunctionType, ModuleType, partial)
Restore = Callable[[], object]


@contextmanager
def left_as_it_was(module: nn.Module, *, training: bool) -> Iterator[None]:
    """Set a mode; on exit restore modes, buffers and attributes of a module and its submodules.

    Plain data, tensors, generators and objects of these in attributes are restored in place, as others may refer to them.
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
                if not key.startswith("_"):  # may be torch's, created in a first pass
                    delattr(part, key)
            vars(part).update(attributes)  # 'training' among them
        for restore in restoring:
            restore()


def _own(part: nn.Module) -> dict[str, Any]:
    """Return a module's attributes, without torch's own tables and those added by wrapping libraries."""
    return {
        key: value for key, value in vars(part).items() if key not in _OF_MODULES and not key.startswith(_OF_WRAPPERS)
    }


def _restoring(value: Any, seen: set[int]) -> Iterator[Restore]:
    """Yield functions that restore a value and everything in it to the current state."""
    if id(value) in seen or _is_code(value):
        return
    seen.add(id(value))
    generator = _restoring_generator(value)
    inner: Iterable[Any] = ()
    if generator is not None:
        yield generator
    elif isinstance(value, Tensor):
        if value.is_leaf and not overlaps(value):
            yield partial(value.detach().copy_, value.detach().clone())
    elif isinstance(value, np.ndarray):
        yield partial(np.copyto, value, value.copy())
    elif isinstance(value, dict):
        yield partial(_refill, value, value.update, dict(value))
        inner = value.values()
    elif isinstance(value, list | deque | set):
        yield partial(_refill, value, value.update if isinstance(value, set) else value.extend, list(value))
        inner = value
    elif isinstance(value, tuple):
        inner = value
    elif hasattr(value, "__dict__"):
        inner = (vars(value),)
    for each in inner:
        yield from _restoring(each, seen)


def _is_code(value: Any) -> bool:
    """Whether a value is not user data: functions, modules, and internals of a library."""
    if isinstance(value, (nn.Module, nn.Parameter, type, *_CODE)):
        return True
    return not isinstance(value, Tensor | torch.Generator) and type(value).__module__.partition(".")[0] in _LIBRARIES


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
