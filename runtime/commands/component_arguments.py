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
"""Kinds of short names: description, YAML key, and the modules searched for the name."""


def describe(target: str, code: Path) -> Iterator[str]:
    """Yield the description of a component, line by line; for a short name, of every match.

    Args:
        code: folder of the user's modules.

    Raises:
        ConfigurationError: nothing has this name.
    """
    component.add_code_folder(code)
    if ":" in target or "." in target:
        try:
            member = component.locate(target, code=code)
        except ComponentError as error:
            raise ConfigurationError([Problem("command line", "TARGET", error.what)]) from error
        yield from _description(target, member, _uses(member))
        return
    matches: dict[int, tuple[Any, list[str]]] = {}
    for kind, key, namespaces in KINDS:
        try:
            member = component.locate(target, namespaces=namespaces)
        except ComponentError:
            continue
        if _is_of_kind(kind, member):
            matches.setdefault(id(member), (member, []))[1].append(f"{kind} ({key})")
    if not matches:
        raise ConfigurationError([Problem("command line", "TARGET", _not_found(target))])
    for number, (member, uses) in enumerate(matches.values()):
        if number:
            yield ""
        yield from _description(target, member, uses)


def _description(target: str, member: Any, uses: list[str]) -> Iterator[str]:
    where = f"{getattr(member, '__module__', '?')}:{getattr(member, '__qualname__', target)}"
    yield f"{target}: {', '.join(uses) or 'a component'}, from {where}"
    summary = _summary(member)
    if summary:
        yield f"  {summary}"
    if not callable(member):
        yield f"  is a {type(member).__name__}, which cannot be called"
        return
    parameters = signature(member)
    if parameters is None:
        yield "  has no signature that Python can inspect"
        return
    if not parameters.parameters:
        yield "  has no arguments"
    num_passed = _num_passed(uses, parameters)
    for number, parameter in enumerate(parameters.parameters.values()):
        yield f"  {_argument(parameter, by_runtime=number < num_passed, uses=uses)}"


def _argument(parameter: inspect.Parameter, *, by_runtime: bool, uses: list[str]) -> str:
    if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
        return f"{'**' if parameter.kind is parameter.VAR_KEYWORD else '*'}{parameter.name}: any other arguments"
    kind = annotated(parameter)
    text = parameter.name + (f": {kind}" if kind else "")
    text += "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
    loss = any(use.startswith("a loss") for use in uses)
    if by_runtime or (loss and parameter.name in ("reduction", "size_average", "reduce")):
        return f"{text}  (passed by Lockstep)"
    if any(use.startswith("a schedule") for use in uses) and parameter.name in schedulers.LENGTHS:
        return f"{text}  (default where required: the run's length)"
    return text if parameter.default is not parameter.empty else f"{text}  (required)"


def _num_passed(uses: list[str], parameters: inspect.Signature) -> int:
    """Return how many leading arguments the runtime passes."""
    first = next(iter(parameters.parameters), "")
    kinds = ("an optimizer", "a schedule", "a sampler")
    return int(any(use.startswith(kinds) for use in uses) and first != "schedulers")


def _summary(member: Any) -> str:
    lines = (inspect.getdoc(member) or "").strip().splitlines()
    return lines[0] if lines else ""


def _is_of_kind(kind: str, member: Any) -> bool:
    """Return whether a module's member is of a kind; torch's modules also hold types, functions and base classes."""
    if kind == "a loss":
        return _is_loss(member)
    return callable(member) and not inspect.ismodule(member)


def _is_loss(member: Any) -> bool:
    from torch.nn.modules.loss import _Loss

    return inspect.isclass(member) and issubclass(member, _Loss | Objective)


def _uses(member: Any) -> list[str]:
    """Return what a class can be used as, from its base classes."""
    from torch import nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler
    from torch.utils.data import Dataset, Sampler

    tests: dict[str, Callable[[], bool]] = {
        "a loss (objective)": lambda: _is_loss(member),
        "an optimizer (optimizer)": lambda: issubclass(member, Optimizer),
        "a schedule (schedule)": lambda: issubclass(member, LRScheduler),
        "a data source (data.train)": lambda: issubclass(member, Dataset),
        "a sampler (data.sampler)": lambda: issubclass(member, Sampler),
        "a module (model)": lambda: issubclass(member, nn.Module) and not _is_loss(member),
    }
    return [use for use, holds in tests.items() if holds()] if inspect.isclass(member) else []


def _not_found(target: str) -> str:
    modules = {namespace for _, _, namespaces in KINDS for namespace in namespaces}
    names = {name for module in modules for name in dir(importlib.import_module(module)) if name[:1].isupper()}
    return (
        f"no model, loss, optimizer, schedule, metric or data source is called {target!r}"
        f"{did_you_mean(target, sorted(names))}; write any other class as 'package.module:Name'"
    )
