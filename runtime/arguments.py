"""Command lines: counts, times, and keys of the YAML, anywhere, as ``key.path=value`` or ``--key.path value``."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Collection, Sequence

from runtime.errors import ConfigurationError, Problem

_FLAG = re.compile(r"--([A-Za-z_]\w*(?:\.\w+)*)(?:=(.*))?", re.DOTALL)

_CLOCK = re.compile(r"(?:(\d+)-)?(\d+):([0-5]?\d):([0-5]?\d)")


def count(text: str) -> int:
    """Parse a number of things there must be at least one of."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def clock_seconds(text: str) -> int | None:
    """Read ``[D-]H:MM:SS``; None for anything else."""
    found = _CLOCK.fullmatch(text)
    if found is None or not text.isascii():
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def parsed(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse a command line on which ``key.path=value`` may also follow options, where argparse gives up on it.

    Raises:
        ConfigurationError: a key is given like an option, and without a value.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options, rest = parser.parse_known_args(with_flags_as_overrides(arguments, _options_of(parser, arguments)))
    for argument in rest:
        if argument.startswith("-") or "=" not in argument or not hasattr(options, "overrides"):
            parser.error(f"unrecognized argument: {argument}")
        options.overrides.append(argument)
    return options


def with_flags_as_overrides(arguments: Sequence[str], options: Collection[str] = ()) -> list[str]:
    """Return arguments in which ``--key.path=value`` and ``--key.path value`` are ``key.path=value``, behind all others.

    Args:
        options: the command's own, which are left alone, as is what is neither one of them nor a key.

    Raises:
        ConfigurationError: there is no value.
    """
    kept: list[str] = []
    overrides: list[str] = []
    left = iter(arguments)
    for word in left:
        match = _FLAG.fullmatch(word)
        if match is None or f"--{match[1]}" in options or ("." not in match[1] and not _is_key(match[1])):
            kept.append(word)
            continue
        value = match[2] if match[2] is not None else next(left, None)
        if value is None or (match[2] is None and value.startswith("--")):
            raise ConfigurationError([Problem("command line", match[1], f"has no value: write --{match[1]}=VALUE")])
        overrides.append(f"{match[1]}={value}")
    return kept + overrides


def _is_key(name: str) -> bool:
    from runtime.config.sections import RunConfiguration

    return name in RunConfiguration.model_fields


def _options_of(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> set[str]:
    """Return the options of a parser and of the command that is given."""
    found = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction) and arguments and arguments[0] in action.choices:
            found |= set(action.choices[arguments[0]]._option_string_actions)
    return found
