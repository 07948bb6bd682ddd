"""Compare the plain attributes of two modules and two optimizers."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from runtime.optimization.combined import members
from runtime.training.buffer_values import same_bits

_OF_MODULES = frozenset(vars(nn.Module()))
_OF_SCHEDULERS = {"step", "_opt_called", "_step_count"}
_COLLECTIONS = (list, tuple, deque, set, frozenset, Mapping)
_PLAIN = (bool, int, float, complex, str, bytes)


def attributes_with_tensors(module: nn.Module) -> set[tuple[str, str]]:
    """Return which plain attributes hold tensors, by module and name."""
    return {
        (path, name)
        for path, part in module.named_modules()
        for name, value in vars(part).items()
        if name not in _OF_MODULES and _holds_tensor(value)
    }


def differing_attributes(
    running: nn.Module,
    built: nn.Module,
    running_optimizer: Optimizer,
    built_optimizer: Optimizer,
    *,
    with_tensors: set[tuple[str, str]],
    caches: bool,
) -> list[str]:
    """Describe the plain attributes that differ, by module and name.

    Args:
        with_tensors: those that held tensors before the built module's first forward pass. Tensors created by a forward pass
            are mostly activations or caches, which the next one creates again.
        caches: whether to include possible caches: such tensors, and tensors of another shape.
    """
    differences, parts = [], dict(built.named_modules())
    for path, part in running.named_modules():
        name = ".".join(filter(None, (path.removeprefix("model").removeprefix("."), "")))
        if path in parts and path:  # the root is Lockstep's TrainingModule, and strategies set attributes on it
            prefix = f"{name}." if name else "model."
            here = {
                name: value
                for name, value in vars(part).items()
                if caches or (path, name) in with_tensors or not _holds_tensor(value)
            }
            differences += _differing(prefix, here, vars(parts[path]), _OF_MODULES, caches)
    for one, other in zip(members(running_optimizer), members(built_optimizer), strict=True):
        differences += _differing(f"{type(one).__name__}.", vars(one), vars(other), _of_optimizers(), caches)
    return differences


@cache
def _of_optimizers() -> frozenset[str]:
    return frozenset(vars(SGD([torch.zeros(1)]))) | _OF_SCHEDULERS | {"members"}  # the first one imports torch._dynamo


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_holds_tensor(inner) for inner in value.values())
    if isinstance(value, list | tuple | deque):
        return any(_holds_tensor(inner) for inner in value)
    return isinstance(value, Tensor)


def _differing(
    prefix: str, here: Mapping[str, Any], there: Mapping[str, Any], left_out: frozenset[str], caches: bool
) -> list[str]:
    differences = []
    for name, value in here.items():
        if name in left_out or name.startswith("_lockstep") or callable(value):
            continue
        difference = _difference(value, there.get(name), caches)
        if difference:
            differences.append(f"{prefix}{name} ({difference})")
    return differences


def _difference(one: Any, other: Any, caches: bool) -> str:
    """Describe how two values differ; empty if they are equal or cannot be compared."""
    generator = _generator_state(one)
    if generator is not None:
        return "" if generator == _generator_state(other) else f"a {type(one).__name__} in another state"
    if isinstance(one, Tensor | np.ndarray):
        return _difference_of_arrays(torch.as_tensor(one), other, caches)
    if isinstance(one, _PLAIN):
        same = one == other or repr(one) == repr(other)
        return "" if same else f"{_short(one)} here, {_short(other)} after loading"
    if isinstance(one, _COLLECTIONS):
        return _difference_of_collections(one, other, caches)
    if caches and type(one) is type(other) and hasattr(one, "__dict__") and not isinstance(one, nn.Module | type):
        return _difference_of_objects(one, other)
    return ""


def _difference_of_objects(one: Any, other: Any) -> str:
    """Compare the plain attributes of two user objects."""
    there = vars(other)
    for name, value in vars(one).items():
        plain = _generator_state(value) is not None or isinstance(value, (*_PLAIN, Tensor, np.ndarray, *_COLLECTIONS))
        if plain and (difference := _difference(value, there.get(name), caches=False)):
            return f"{name}: {difference}"
    return ""


def _difference_of_arrays(one: Tensor, other: Any, caches: bool) -> str:
    if not isinstance(other, Tensor | np.ndarray):
        return "a tensor here, none after loading" if caches else ""
    second = torch.as_tensor(other)
    if one.shape != second.shape:
        return f"shape {tuple(one.shape)} here, {tuple(second.shape)} after loading" if caches else ""
    return "" if same_bits(one.cpu(), second.cpu()) else "a tensor with other values"


def _difference_of_collections(one: Any, other: Any, caches: bool) -> str:
    if type(one) is not type(other):
        return f"a {type(one).__name__} here, {_short(other)} after loading" if caches else ""
    if len(one) != len(other):
        return f"{len(one)} entries here, {len(other)} after loading"
    if isinstance(one, set | frozenset):
        return "" if one == other else "other entries"
    if isinstance(one, Mapping):
        if one.keys() != other.keys():
            return "other keys"
        pairs = [(one[key], other[key]) for key in one]
    else:
        pairs = list(zip(one, other, strict=True))
    return next((text for first, second in pairs if (text := _difference(first, second, caches))), "")


def _generator_state(value: Any) -> Any:
    if isinstance(value, torch.Generator):
        return value.get_state().numpy().tobytes()
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, np.random.Generator):
        return repr(value.bit_generator.state)
    if isinstance(value, np.random.RandomState):
        return repr(value.get_state())
    return None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
