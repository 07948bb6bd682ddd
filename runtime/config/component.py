"""Targets: ``"package.module:Name"`` plus arguments, looked up, checked against the signature, then called.

No string is ever evaluated. A short name (``AdamW``) is looked up in the modules that the caller names; a full target in
installed packages and then in the run's code folder, which is appended to ``sys.path`` so that it cannot shadow anything.
Within arguments ``{target: …, args: {…}}`` is a nested component; a function without ``args`` is passed uncalled.
This module does not import torch.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import inspect
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from runtime.config.signatures import argument_mistakes
from runtime.wording import did_you_mean

_EXTRAS = {
    "datasets": "datasets",
    "matplotlib": "plots",
    "PIL": "images",
    "pyarrow": "parquet",
    "sklearn": "examples",
    "transformers": "transformers",
    "wandb": "wandb",
}
"""The extra of lockstep-train that installs each module."""
INSTALLED = tuple({path for path in sysconfig.get_paths().values() if path != sysconfig.get_path("data")})


_PYTHON_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*(:[^\W\d]\w*|\.[^\W\d]\w*)(\.[^\W\d]\w*)*")
_NESTED_COMPONENT_HINT = " (within arguments, a mapping of 'target' and 'args' is a component to be built)"


class ComponentError(Exception):
    """One mistake in a component; ``path`` is the wrong key, relative to the component."""

    def __init__(self, what: str, path: tuple[str, ...] = ("target",)) -> None:
        super().__init__(what)
        self.what = what
        self.path = path


def add_code_folder(folder: Path) -> None:
    """Append the user's code folder to ``sys.path`` (once); never in front, so that it shadows nothing."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def locate(target: str, *, namespaces: Sequence[str] = (), code: Path | None = None) -> Any:
    """Return the object that a target names.

    Args:
        target: ``"package.module:Name"``, the same with a dot for the colon, or a short name.
        namespaces: modules in which a short name is looked up, in order.
        code: the run's code folder, if any.

    Raises:
        ComponentError: it does not exist, cannot be imported, or is ambiguous.
    """
    if ":" not in target and "." not in target:
        return _locate_short(target, namespaces)
    module_name, _, qualified_name = (target if ":" in target else _with_colon(target, code)).partition(":")
    if not module_name or not qualified_name:
        raise ComponentError(f"{target!r} is not of the form 'package.module:Name'")
    if code is not None and module_name != "__main__":
        _refuse_ambiguous(module_name.partition(".")[0], code)
    found = _import(module_name, target)
    for name in qualified_name.split("."):
        try:
            found = getattr(found, name)
        except AttributeError:
            hint = did_you_mean(name, (n for n in dir(found) if not n.startswith("_")))
            raise ComponentError(f"module {module_name!r} has no {qualified_name!r}{hint}") from None
        except Exception as error:  # a package may import its members lazily
            raise ComponentError(f"looking up {target!r} raised {described(error)}") from error
    return found


def check_arguments(
    component: Callable[..., Any], args: Mapping[str, Any], *, positional: int = 0, name: str = ""
) -> list[ComponentError]:
    """Check arguments against a signature, without calling anything; see :func:`argument_mistakes`."""
    mistakes = argument_mistakes(component, args, positional=positional, name=name)
    return [ComponentError(what, path) for path, what in mistakes]


def check(
    target: str,
    args: Mapping[str, Any],
    *,
    namespaces: Sequence[str] = (),
    code: Path | None = None,
    positional: int = 0,
    filled_in: Sequence[str] = (),
) -> list[ComponentError]:
    """Locate a component and everything nested in its arguments, and check all signatures. Calls nothing.

    Args:
        filled_in: arguments that the runtime adds by name if they are omitted.
    """
    try:
        component = locate(target, namespaces=namespaces, code=code)
    except ComponentError as unlocated:
        return [unlocated]
    if not callable(component):
        return [ComponentError(f"{target!r} is not callable")]
    with_filled = {**dict.fromkeys(filled_in), **args}
    mistakes = check_arguments(component, with_filled, positional=positional)
    for path, nested in nested_components(args, ("args",)):
        if "args" in nested:
            inner_mistakes = check(nested["target"], nested["args"] or {}, code=code)
            mistakes += [ComponentError(inner.what, path + inner.path) for inner in inner_mistakes]
            continue
        try:
            located = locate(nested["target"], code=code)
        except ComponentError as mistake:
            hint = _NESTED_COMPONENT_HINT if mistake.what.startswith("cannot import") else ""
            mistakes.append(ComponentError(f"{mistake.what}{hint}", path + mistake.path))
            continue
        if inspect.isclass(located):
            mistakes += [ComponentError(m.what, path + m.path) for m in check_arguments(located, {})]
    return mistakes


def build(
    target: str,
    args: Mapping[str, Any],
    *positional: Any,
    namespaces: Sequence[str] = (),
    code: Path | None = None,
) -> Any:
    """Locate a component and call it with positional arguments from the runtime and the configured keyword arguments.

    Raises:
        ComponentError: it cannot be located, or it raised; the message names the line that raised.
    """
    component = locate(target, namespaces=namespaces, code=code)
    return call(component, target, *positional, **resolved(args, code=code))


def resolved(args: Mapping[str, Any], *, code: Path | None = None) -> dict[str, Any]:
    """Return arguments with nested components built."""
    return {key: _resolve(value, code, ("args", key)) for key, value in args.items()}


def call(component: Callable[..., Any], name: str, /, *positional: Any, **arguments: Any) -> Any:
    """Call a component; reraise its exceptions as :class:`ComponentError`, except a LockstepError.

    This function's own parameters are positional-only, since the user's arguments may have any name.
    """
    from runtime.errors import LockstepError

    try:
        return component(*positional, **arguments)
    except LockstepError:
        raise
    except Exception as error:
        raise ComponentError(f"{name} raised {described(error)}", ("args",)) from error


def described(error: BaseException) -> str:
    """Describe an error with the innermost line of the user's code, or else the innermost line."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{type(error).__name__}: {error.msg} (at {error.filename}:{error.lineno})"
    frames = traceback.extract_tb(error.__traceback__)
    foreign = (*INSTALLED, str(Path(__file__).parents[1]), "<")
    own = [frame for frame in frames if not frame.filename.startswith(foreign)]
    frame = (own or frames)[-1]
    return f"{type(error).__name__}: {error} (at {frame.filename}:{frame.lineno})"


def _resolve(value: Any, code: Path | None, path: tuple[str, ...]) -> Any:
    if isinstance(value, Mapping) and is_component(value):
        try:
            if "args" in value:
                return build(value["target"], value["args"] or {}, code=code)
            located = locate(value["target"], code=code)
            return call(located, value["target"]) if inspect.isclass(located) else located
        except ComponentError as mistake:
            raise ComponentError(mistake.what, path + mistake.path) from mistake.__cause__
    if isinstance(value, Mapping):
        return {key: _resolve(inner, code, (*path, str(key))) for key, inner in value.items()}
    if isinstance(value, list):
        return [_resolve(inner, code, (*path, str(number))) for number, inner in enumerate(value)]
    return value


def is_component(value: Mapping[Any, Any]) -> bool:
    """Return whether a mapping within arguments is a nested component, rather than data that has a key ``target``.

    With ``args``, a target needs a colon or a dot; without, it must also be a valid Python name, and a dotted one must begin
    with a module that exists: ``{target: price.usd}`` may be a column of the user's data.
    """
    target, args = value.get("target"), value.get("args")
    if set(value) not in ({"target"}, {"target", "args"}) or not isinstance(target, str):
        return False
    if "args" in value:
        return (":" in target or "." in target) and (args is None or isinstance(args, Mapping))
    return bool(_PYTHON_NAME.fullmatch(target)) and (":" in target or _is_module(target.partition(".")[0]))


def nested_components(value: Any, path: tuple[str, ...]) -> Iterable[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """Yield the components directly within arguments, each with its path."""
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, inner in items:
        if isinstance(inner, Mapping) and is_component(inner):
            yield (*path, str(key)), inner
        else:
            yield from nested_components(inner, (*path, str(key)))


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ValueError, ImportError):
        return False


def _with_colon(target: str, code: Path | None) -> str:
    """Put the colon of a dotted path after its longest prefix that is a module, at least one name before its end."""
    parts = target.split(".")
    if not all(part.isidentifier() for part in parts):
        raise ComponentError(f"{target!r} is not of the form 'package.module:Name'")
    if code is not None and parts[0] != "__main__":
        _refuse_ambiguous(parts[0], code)
    for length in range(len(parts) - 1, 1, -1):
        try:
            if importlib.util.find_spec(".".join(parts[:length])) is not None:
                return f"{'.'.join(parts[:length])}:{'.'.join(parts[length:])}"
        except ModuleNotFoundError:  # the parent is not a package
            continue
        except (Exception, SystemExit):  # a package that cannot be imported: the caller's import reports the reason
            return f"{'.'.join(parts[: length - 1])}:{'.'.join(parts[length - 1 :])}"
    return f"{parts[0]}:{'.'.join(parts[1:])}"


def _locate_short(name: str, namespaces: Sequence[str]) -> Any:
    known: list[str] = []
    for namespace in namespaces:
        module = _import(namespace, name)
        if hasattr(module, name):
            return getattr(module, name)
        known += [n for n in dir(module) if n[:1].isupper()]
    if not namespaces:
        raise ComponentError(f"{name!r} is not of the form 'package.module:Name'")
    raise ComponentError(f"no {name!r} in {' or '.join(namespaces)}{did_you_mean(name, known)}")


def _import(module_name: str, target: str) -> Any:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise ComponentError(
                f"cannot import {module_name!r}: no module {error.name!r} among the installed packages or in the code "
                f"folder (key 'code', by default the folder of the YAML file){_install_hint(error.name)}"
            ) from error
        hint = _install_hint(error.name)
        raise ComponentError(f"{target!r} needs the package {error.name!r}, which is not installed{hint}") from error
    except (Exception, SystemExit) as error:  # importing a script may exit the process
        raise ComponentError(f"importing {module_name!r} raised {described(error)}") from error


def _install_hint(module: str | None) -> str:
    extra = _EXTRAS.get((module or "").partition(".")[0])
    return f": pip install 'lockstep-train[{extra}]'" if extra else ""


def _refuse_ambiguous(package: str, code: Path) -> None:
    in_code = importlib.machinery.PathFinder.find_spec(package, [str(code)])
    if in_code is None:
        return
    paths = sys.path
    sys.path = [p for p in paths if p and Path(p).resolve() != code.resolve()]
    try:
        installed = importlib.util.find_spec(package)
    except (ValueError, ImportError):  # __main__ has no spec
        installed = None
    finally:
        sys.path = paths
    if installed is not None and _location(installed) != _location(in_code):
        raise ComponentError(
            f"{package!r} is both an installed package ({_location(installed)}) and in the code folder "
            f"({_location(in_code)}); rename yours"
        )


def _location(spec: importlib.machinery.ModuleSpec) -> str:
    if spec.origin and spec.origin not in ("built-in", "frozen"):
        return str(Path(spec.origin).resolve())
    locations = list(spec.submodule_search_locations or [])
    return str(Path(locations[0]).resolve()) if locations else str(spec.origin)
