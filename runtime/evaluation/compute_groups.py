"""Groups of metrics that gather the same state, so that it is updated, kept and sent once.

torchmetrics' MetricCollection finds them by comparing values after the first batch, so top-1 and top-2 accuracy stay merged
after an easy first batch. Here their definitions are compared: the code of ``update``, every attribute of the metric that it
reads, and the states' defaults.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torchmetrics import Metric

_READ_ANYTHING = {"getattr", "vars", "__dict__", "super", "eval", "exec"}  # may read attributes not named in the code


def sharing_state(metrics: Mapping[str, Metric]) -> list[list[str]]:
    """Return the names in groups whose metrics have the same state after any updates; most groups have one metric."""
    groups: list[list[str]] = []
    for name, metric in metrics.items():
        equal = next((group for group in groups if _same_state(metrics[group[0]], metric)), None)
        if equal is None:
            groups.append([name])
        else:
            equal.append(name)
    return groups


def _same_state(first: Metric, second: Metric) -> bool:
    if type(first).update is not type(second).update or not _same_defaults(first, second):
        return False
    names = _read_by_update(type(first))
    return (
        names is not None
        and names == _read_by_update(type(second))
        and all(
            _same(getattr(first, name, None), getattr(second, name, None))
            for name in names
            if name not in first._defaults
        )
    )


def _same_defaults(first: Metric, second: Metric) -> bool:
    if not first._defaults or first._defaults.keys() != second._defaults.keys():
        return False
    return first._reductions == second._reductions and all(
        _same(default, second._defaults[name]) for name, default in first._defaults.items()
    )


def _read_by_update(owner: type[Metric]) -> set[str] | None:
    """Return all names in the code of ``update`` and of the methods that it calls, or None if it may read others."""
    names: set[str] = set()
    pending: list[Any] = [inspect.unwrap(owner.update)]
    while pending:
        function = pending.pop()
        if not isinstance(function, FunctionType):
            return None
        new = set(_names(function.__code__)) - names
        if new & _READ_ANYTHING:
            return None
        names |= new
        pending += [
            m for m in (inspect.getattr_static(owner, name, None) for name in new) if isinstance(m, FunctionType)
        ]
    return names


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, Tensor) or isinstance(second, Tensor):
        return False
    if inspect.ismethod(first) and inspect.ismethod(second):
        return first.__func__ is second.__func__
    return bool(first is second or (type(first) is type(second) and first == second))
