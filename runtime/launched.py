"""The commands that run in each launched process: parse arguments, run, print one error message, return an exit code."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence

from runtime import environment
from runtime.arguments import parsed, with_flags_as_overrides
from runtime.commands.inference import DESCRIPTIONS, add_inference, chosen_options
from runtime.errors import LockstepError
from runtime.guarded import print_error

_USAGE = "usage: accelerate launch runtime/{}.py CONFIG [key.path=value …]"


def run(command: str, arguments: Sequence[str]) -> int:
    """Run a command in a launched process.

    Args:
        command: ``train``, ``doctor``, ``evaluate`` or ``predict``.
        arguments: the command's arguments.

    Returns:
        The exit code: 0 finished (``train``: or stopped), 75 stopped, 2 configuration error, 1 failure; ``accelerate
        launch`` turns all but 0 into 1.
    """
    if command in DESCRIPTIONS:
        return _infer(command, arguments)
    return _with_config(command, arguments, {"train": _train, "doctor": _examine}[command])


def _train(source: str, overrides: Sequence[str]) -> int:
    from runtime.session import train

    train(source, *overrides)
    return 0


def _examine(source: str, overrides: Sequence[str]) -> int:
    from runtime import session

    diagnosis = session.examine(source, *overrides)
    if environment.rank() == 0:
        from runtime.run.diagnosis import table

        print(table(diagnosis), flush=True)
    return 0


def _with_config(name: str, arguments: Sequence[str], act: Callable[[str, Sequence[str]], int]) -> int:
    """Call a command's function with CONFIG and overrides; print errors in these or in the launch."""
    words = without_local_rank(arguments)
    if _has_no_config(words):
        return _usage(name, words)
    try:
        words = with_flags_as_overrides(words)
        if unknown := next((word for word in words if word.startswith("-")), None):
            print(f"lockstep: unrecognized argument: {unknown}\n{_USAGE.format(name)}", file=sys.stderr)
            return 2
        environment.check_launched_world_size()  # before torch is imported, which takes seconds
        return act(words[0], words[1:])
    except LockstepError as error:
        return print_error(error)


def without_local_rank(arguments: Sequence[str]) -> list[str]:
    """Drop the ``--local-rank`` that other libraries' launchers add: LOCAL_RANK holds the same."""
    return [argument for argument in arguments if not re.fullmatch(r"--local[-_]rank=\d+", argument)]


def _has_no_config(arguments: Sequence[str]) -> bool:
    words = [word for word in arguments if not word.startswith("-")]
    return not words or "=" in arguments[0] or arguments[0] in ("-h", "--help")


def _usage(act: str, arguments: Sequence[str]) -> int:
    """Print the usage, on rank 0 only."""
    help_requested = bool(arguments) and arguments[0] in ("-h", "--help")
    if environment.rank() == 0:
        missing = "" if help_requested else "lockstep: CONFIG is missing: name the run's YAML file\n"
        print(f"{missing}{_USAGE.format(act)}", file=sys.stderr)
    return 0 if help_requested else 2


def _infer(act: str, arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog=f"accelerate launch runtime/{act}.py", description=DESCRIPTIONS[act])
    add_inference(parser, act)
    try:
        options = parsed(parser, without_local_rank(arguments))
        environment.check_launched_world_size()
        from runtime import session

        result = (session.evaluate if act == "evaluate" else session.predict)(
            options.source, *options.overrides, **chosen_options(options)
        )
    except LockstepError as error:
        return print_error(error)
    return 0 if result.outcome == "finished" else 75
