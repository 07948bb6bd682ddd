"""Checks configured arguments against a signature: unknown, missing, or of the wrong type. Imports no torch."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from runtime.wording import did_you_mean

_NUMERIC = {"int", "float", "complex", "bool", "None", "NoneType", "Optional", "Union", "typing", "torch", "Tensor"}
"""Names allowed in the annotation of an argument that takes no text."""


def argument_mistakes(
    component: Callable[..., Any], args: Mapping[str, Any], *, positional: int = 0, name: str = ""
) -> Iterator[tuple[tuple[str, ...], str]]:
    """Check arguments against a signature; yield the key of each mistake and a message.

    Args:
        component: the callable.
        args: keyword arguments from the configuration.
        positional: number of leading arguments that the runtime passes.
        name: of the component in messages.
    """
    callee = signature(component)
    if callee is None:  # some builtins have none: calling them raises their own error
        return
    parameters = list(callee.parameters.values())
    name = name or getattr(component, "__name__", str(component))
    passed = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][:positional]
    by_keyword = {
        p.name: p for p in parameters if p not in passed and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    }
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    for key, value in args.items():
        if not isinstance(key, str):
            yield ("args", str(key)), f"argument names of {name} must be text, not {key!r}"
        elif key in (p.name for p in passed):
            yield ("args", key), f"{name} gets its {key!r} from the runtime; leave it out"
        elif key not in by_keyword and not takes_any:
            yield ("args", key), f"{name} has no argument {key!r}{did_you_mean(key, by_keyword)}{_listed(by_keyword)}"
        elif key in by_keyword and isinstance(value, str) and takes_no_text(by_keyword[key]):
            yield ("args", key), f"{name} takes {annotated(by_keyword[key])} for {key!r}, not the text {value!r}"
        elif key in by_keyword and isinstance(value, bool) and _takes_fractions(by_keyword[key]):
            yield ("args", key), f"{name} takes {annotated(by_keyword[key])} for {key!r}, not {str(value).lower()}"
    missing = [key for key, p in by_keyword.items() if p.default is p.empty and key not in args]
    if missing:
        words = ", ".join(repr(key) for key in missing)
        yield ("args",), f"{name} needs the argument{'s' * (len(missing) > 1)} {words}"


def signature(component: Any) -> inspect.Signature | None:
    """Return a component's signature, or None if it has none."""
    try:
        return inspect.signature(component)
    except (ValueError, TypeError):
        return None


def annotated(parameter: inspect.Parameter) -> str:
    """Return a parameter's annotation as text, empty if it has none."""
    if parameter.annotation is parameter.empty:
        return ""
    if isinstance(parameter.annotation, str):
        return parameter.annotation
    return inspect.formatannotation(parameter.annotation)


def class_name(target: str | None) -> str:
    """Return the last name of a target, after its colon and dots, if any."""
    return re.split("[:.]", target or "")[-1]


def takes_no_text(parameter: inspect.Parameter) -> bool:
    """Return whether an annotation allows only numbers."""
    names = set(re.findall(r"\w+", annotated(parameter)))
    return bool(names & {"int", "float", "complex", "bool"}) and names <= _NUMERIC


def _takes_fractions(parameter: inspect.Parameter) -> bool:
    """Return whether an annotation allows only floats and tensors, so that a bool (a number in Python) is a mistake."""
    names = set(re.findall(r"\w+", annotated(parameter)))
    return "float" in names and names <= _NUMERIC - {"int", "bool"}


def _listed(by_keyword: Mapping[str, inspect.Parameter]) -> str:
    if not by_keyword:
        return " (it has none)"
    return f" (its arguments: {', '.join(by_keyword)})"
