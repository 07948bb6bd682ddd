"""Targets: ``"package.module:Name"`` plus arguments, looked up, checked against the signature, then called.

No string is ever evaluated. A short name (``AdamW``) is looked up in the modules that the caller names; a full target in
installed packages and then in the run's code folder, which is appended to ``sys.path`` so that it can shadow nothing.
Within arguments ``{target: …, args: {…}}`` is a component of its own; a function without ``args`` is handed on as it is.
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
"""Modules that an extra of lockstep-train brings."""
INSTALLED = tuple({path for path in sysconfig.get_paths().values() if path != sysconfig.get_path("data")})


_PYTHON_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*(:[^\W\d]\w*|\.[^\W\d]\w*)(\.[^\W\d]\w*)*")
_TAKEN_FOR_A_COMPONENT = " (within arguments, a mapping of 'target' and 'args' is a component to be built)"


class ComponentError(Exception):
    """One mistake in a component; ``path`` leads from the component to the key that is wrong."""

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
        ComponentError: nothing is there, it does not import, or two places have it.
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
        except Exception as error:  # a package may import what it names only when it is asked for
            raise ComponentError(f"looking up {target!r} raised {described(error)}") from error
    return found


def check_arguments(
    component: Callable[..., Any], args: Mapping[str, Any], *, positional: int = 0, name: str = ""
) -> list[ComponentError]:
    """Compare arguments with a signature, without calling anything; see :func:`argument_mistakes`."""
    found = argument_mistakes(component, args, positional=positional, name=name)
    return [ComponentError(what, path) for path, what in found]


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
        filled_in: arguments that the runtime adds by name if they are left out.
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
            found = check(nested["target"], nested["args"] or {}, code=code)
            mistakes += [ComponentError(inner.what, path + inner.path) for inner in found]
            continue
        try:
            found_alone = locate(nested["target"], code=code)
        except ComponentError as mistake:
            taken = _TAKEN_FOR_A_COMPONENT if mistake.what.startswith("cannot import") else ""
            mistakes.append(ComponentError(f"{mistake.what}{taken}", path + mistake.path))
            continue
        if inspect.isclass(found_alone):
            mistakes += [ComponentError(m.what, path + m.path) for m in check_arguments(found_alone, {})]
    return mistakes


def build(
    target: str,
    args: Mapping[str, Any],
    *given: Any,
    namespaces: Sequence[str] = (),
    code: Path | None = None,
) -> Any:
    """Locate a component and call it with what the runtime gives and the configured arguments.

    Raises:
        ComponentError: it cannot be located, or it raised; the message names the line that raised.
    """
    component = locate(target, namespaces=namespaces, code=code)
    return call(component, target, *given, **resolved(args, code=code))


def resolved(args: Mapping[str, Any], *, code: Path | None = None) -> dict[str, Any]:
    """Return arguments with the components within them built."""
    return {key: _resolve(value, code, ("args", key)) for key, value in args.items()}


def call(component: Callable[..., Any], name: str, /, *given: Any, **arguments: Any) -> Any:
    """Call a component; what it raises comes back as one :class:`ComponentError`, Lockstep's own errors as they are.

    Our own parameters are positional only, since the user's arguments may have any name: ``name`` and ``component``, too.
    """
    from runtime.errors import LockstepError

    try:
        return component(*given, **arguments)
    except LockstepError:
        raise
    except Exception as error:
        raise ComponentError(f"{name} raised {described(error)}", ("args",)) from error


def described(error: BaseException) -> str:
    """Describe an error with the innermost line that is the user's own, or if there is none with the innermost of all."""
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
            found = locate(value["target"], code=code)
            return call(found, value["target"]) if inspect.isclass(found) else found
        except ComponentError as mistake:
            raise ComponentError(mistake.what, path + mistake.path) from mistake.__cause__
    if isinstance(value, Mapping):
        return {key: _resolve(inner, code, (*path, str(key))) for key, inner in value.items()}
    if isinstance(value, list):
        return [_resolve(inner, code, (*path, str(number))) for number, inner in enumerate(value)]
    return value


def is_component(value: Mapping[Any, Any]) -> bool:
    """Tell whether a mapping within arguments is a component of its own, rather than data that has a key ``target``.

    With ``args`` beside it a target is one that has a colon or a dot; alone it must also be what Python can name, and a
    dotted one begin with a module that exists: ``{target: price.usd}`` may be a column of the user's.
    """
    target, args = value.get("target"), value.get("args")
    if set(value) not in ({"target"}, {"target", "args"}) or not isinstance(target, str):
        return False
    if "args" in value:
        return (":" in target or "." in target) and (args is None or isinstance(args, Mapping))
    return bool(_PYTHON_NAME.fullmatch(target)) and (":" in target or _is_module(target.partition(".")[0]))


def nested_components(value: Any, path: tuple[str, ...]) -> Iterable[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """Yield the components within arguments, each with its path; not those within components."""
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
    """Put the colon of a dotted path behind the longest part of it that is a module, at least one name before its end."""
    parts = target.split(".")
    if not all(part.isidentifier() for part in parts):
        raise ComponentError(f"{target!r} is not of the form 'package.module:Name'")
    if code is not None and parts[0] != "__main__":
        _refuse_ambiguous(parts[0], code)
    for length in range(len(parts) - 1, 1, -1):
        try:
            if importlib.util.find_spec(".".join(parts[:length])) is not None:
                return f"{'.'.join(parts[:length])}:{'.'.join(parts[length:])}"
        except ModuleNotFoundError:  # what is before it is no package
            continue
        except (Exception, SystemExit):  # a package that does not import: the import below tells why
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
                f"folder (key 'code', by default the folder of the YAML file){_cure(error.name)}"
            ) from error
        cure = _cure(error.name)
        raise ComponentError(f"{target!r} needs the package {error.name!r}, which is not installed{cure}") from error
    except (Exception, SystemExit) as error:  # a script that was meant to be run ends the process
        raise ComponentError(f"importing {module_name!r} raised {described(error)}") from error


def _cure(module: str | None) -> str:
    extra = _EXTRAS.get((module or "").partition(".")[0])
    return f": pip install 'lockstep-train[{extra}]'" if extra else ""


def _refuse_ambiguous(package: str, code: Path) -> None:
    own = importlib.machinery.PathFinder.find_spec(package, [str(code)])
    if own is None:
        return
    paths = sys.path
    sys.path = [p for p in paths if p and Path(p).resolve() != code.resolve()]
    try:
        installed = importlib.util.find_spec(package)
    except (ValueError, ImportError):  # __main__ has no spec
        installed = None
    finally:
        sys.path = paths
    if installed is not None and _place(installed) != _place(own):
        raise ComponentError(
            f"{package!r} is both an installed package ({_place(installed)}) and in the code folder ({_place(own)}); "
            "rename yours"
        )


def _place(spec: importlib.machinery.ModuleSpec) -> str:
    if spec.origin and spec.origin not in ("built-in", "frozen"):
        return str(Path(spec.origin).resolve())
    locations = list(spec.submodule_search_locations or [])
    return str(Path(locations[0]).resolve()) if locations else str(spec.origin)
