"""The arguments of a component: what ``lockstep describe TARGET`` prints."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from runtime.build.components import TABLE
from runtime.config import component
from runtime.config.component import ComponentError
from runtime.config.signatures import annotated, signature
from runtime.errors import ConfigurationError, Problem
from runtime.objective import Objective
from runtime.optimization import schedulers
from runtime.wording import did_you_mean

_NAMESPACES = {row.key.removesuffix(".*"): row.namespaces for row in TABLE}
KINDS = tuple(
    (kind, key, _NAMESPACES[key])
    for kind, key in (
        ("a model", "model"),
        ("a loss", "objective"),
        ("an optimizer", "optimizer"),
        ("a schedule", "schedule"),
        ("a metric", "evaluation.metrics"),
        ("a data source", "data.train"),
        ("a sampler", "data.sampler"),
        ("a transform", "data.train.transform"),
        ("a collate function", "data.collate"),
    )
)
"""What a short name can be, the key it is given under, and the modules it is looked up in."""


def describe(target: str, code: Path) -> Iterator[str]:
    """Yield what is known of a target or short name, line by line; a name that several kinds have, once for each place.

    Args:
        code: folder of the user's own modules.

    Raises:
        ConfigurationError: nothing is called so.
    """
    component.add_code_folder(code)
    if ":" in target or "." in target:
        try:
            found = component.locate(target, code=code)
        except ComponentError as mistake:
            raise ConfigurationError([Problem("command line", "TARGET", mistake.what)]) from mistake
        yield from _described(target, found, _uses(found))
        return
    places: dict[int, tuple[Any, list[str]]] = {}
    for kind, key, namespaces in KINDS:
        try:
            found = component.locate(target, namespaces=namespaces)
        except ComponentError:
            continue
        if _fits(kind, found):
            places.setdefault(id(found), (found, []))[1].append(f"{kind} ({key})")
    if not places:
        raise ConfigurationError([Problem("command line", "TARGET", _nothing(target))])
    for number, (found, uses) in enumerate(places.values()):
        if number:
            yield ""
        yield from _described(target, found, uses)


def _described(target: str, found: Any, uses: list[str]) -> Iterator[str]:
    where = f"{getattr(found, '__module__', '?')}:{getattr(found, '__qualname__', target)}"
    yield f"{target}: {', '.join(uses) or 'a component'}, from {where}"
    summary = _summary(found)
    if summary:
        yield f"  {summary}"
    if not callable(found):
        yield f"  is a {type(found).__name__}, which cannot be called"
        return
    known = signature(found)
    if known is None:
        yield "  Python knows no arguments of it"
        return
    if not known.parameters:
        yield "  has no arguments"
    given = _given(uses, known)
    for number, parameter in enumerate(known.parameters.values()):
        yield f"  {_argument(parameter, by_runtime=number < given, uses=uses)}"


def _argument(parameter: inspect.Parameter, *, by_runtime: bool, uses: list[str]) -> str:
    if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
        return f"{'**' if parameter.kind is parameter.VAR_KEYWORD else '*'}{parameter.name}: any others"
    kind = annotated(parameter)
    text = parameter.name + (f": {kind}" if kind else "")
    text += "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
    loss = any(use.startswith("a loss") for use in uses)
    if by_runtime or (loss and parameter.name in ("reduction", "size_average", "reduce")):
        return f"{text}  (Lockstep gives it)"
    if any(use.startswith("a schedule") for use in uses) and parameter.name in schedulers.LENGTHS:
        return f"{text}  (where left out and required: the run's length)"
    return text if parameter.default is not parameter.empty else f"{text}  (required)"


def _given(uses: list[str], known: inspect.Signature) -> int:
    """Return how many leading arguments the runtime gives."""
    first = next(iter(known.parameters), "")
    kinds = ("an optimizer", "a schedule", "a sampler")
    return int(any(use.startswith(kinds) for use in uses) and first != "schedulers")


def _summary(found: Any) -> str:
    lines = (inspect.getdoc(found) or "").strip().splitlines()
    return lines[0] if lines else ""


def _fits(kind: str, found: Any) -> bool:
    """Tell whether a module's member is of a kind: torch's modules have types, functions and base classes beside them."""
    if kind == "a loss":
        return _is_loss(found)
    return callable(found) and not inspect.ismodule(found)


def _is_loss(found: Any) -> bool:
    from torch.nn.modules.loss import _Loss

    return inspect.isclass(found) and issubclass(found, _Loss | Objective)


def _uses(found: Any) -> list[str]:
    """Say what a class can be used for by what it is derived from."""
    from torch import nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler
    from torch.utils.data import Dataset, Sampler

    tests: dict[str, Callable[[], bool]] = {
        "a loss (objective)": lambda: _is_loss(found),
        "an optimizer (optimizer)": lambda: issubclass(found, Optimizer),
        "a schedule (schedule)": lambda: issubclass(found, LRScheduler),
        "a data source (data.train)": lambda: issubclass(found, Dataset),
        "a sampler (data.sampler)": lambda: issubclass(found, Sampler),
        "a module (model)": lambda: issubclass(found, nn.Module) and not _is_loss(found),
    }
    return [use for use, holds in tests.items() if holds()] if inspect.isclass(found) else []


def _nothing(target: str) -> str:
    modules = {namespace for _, _, namespaces in KINDS for namespace in namespaces}
    names = {name for module in modules for name in dir(importlib.import_module(module)) if name[:1].isupper()}
    return (
        f"no model, loss, optimizer, schedule, metric or data source is called {target!r}"
        f"{did_you_mean(target, sorted(names))}; anything else is 'package.module:Name'"
    )
