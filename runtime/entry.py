"""What the entry points share: arguments in, one message and an exit code out, never a traceback for a user's mistake."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Literal

from runtime import environment
from runtime.errors import EQUAL_ON_ALL_RANKS, ConfigurationError, LockstepError, Problem
from runtime.open_files import open_files_error, raise_open_files_limit
from runtime.output import protect_output, settle_output

_USAGE = "usage: accelerate launch runtime/{}.py CONFIG [key.path=value …]"


def main(arguments: Sequence[str]) -> int:
    """Train as one of the launched processes; return the exit code: 0 finished or stopped, 2 configuration, 1 failure."""

    def act(source: str, overrides: Sequence[str]) -> int:
        from runtime.session import train

        train(source, *overrides)
        return 0

    return _run("train", arguments, act)


def examine(arguments: Sequence[str]) -> int:
    """Examine as one of the launched processes; return the exit code: 0 all is well, 2 configuration, 1 it is not."""

    def act(source: str, overrides: Sequence[str]) -> int:
        from runtime import session

        examined = session.examine(source, *overrides)
        if environment.rank() == 0:
            from runtime.commands.doctor import table

            print(table(examined), flush=True)
        return 0

    return _run("doctor", arguments, act)


def guarded(act: Callable[[], int]) -> int:
    """Call what a process of ours is for; return its exit code, whatever became of those who read what it printed."""
    protect_output()
    raise_open_files_limit()
    try:
        return act()
    except OSError as error:
        in_words = open_files_error(error)  # before a run has begun
        if in_words is None:
            raise
        return _tell(in_words)
    except KeyboardInterrupt:  # before a run has taken over the signals, or after
        print("lockstep: interrupted", file=sys.stderr)
        return 75
    finally:
        # Python ends the loader's workers that are left, and torch's handler would raise that they were killed.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        settle_output()


def _run(name: str, arguments: Sequence[str], act: Callable[[str, Sequence[str]], int]) -> int:
    """Call what an entry point is for with CONFIG and overrides; tell what is wrong with them, or with the launch."""
    given = without_local_rank(arguments)
    if _has_no_config(given):
        return _usage(name, given)
    try:
        given = with_flags_as_overrides(given)
        if strange := next((word for word in given if word.startswith("-")), None):
            print(f"lockstep: unrecognized argument: {strange}\n{_USAGE.format(name)}", file=sys.stderr)
            return 2
        environment.check_launched_world_size()  # before torch is imported, which takes seconds
        return act(given[0], given[1:])
    except LockstepError as error:
        return _tell(error)


def without_local_rank(arguments: Sequence[str]) -> list[str]:
    """Leave out what the launchers of other libraries add: LOCAL_RANK says the same."""
    return [argument for argument in arguments if not re.fullmatch(r"--local[-_]rank=\d+", argument)]


def _has_no_config(arguments: Sequence[str]) -> bool:
    words = [word for word in arguments if not word.startswith("-")]
    return not words or "=" in arguments[0] or arguments[0] in ("-h", "--help")


def _usage(act: str, arguments: Sequence[str]) -> int:
    """Say how it is called; on rank 0 alone, where several processes were started without a CONFIG."""
    asked = bool(arguments) and arguments[0] in ("-h", "--help")
    if environment.rank() == 0:
        missing = "" if asked else "lockstep: CONFIG is missing: name the run's YAML file\n"
        print(f"{missing}{_USAGE.format(act)}", file=sys.stderr)
    return 0 if asked else 2


def infer(act: Literal["evaluate", "predict"], arguments: Sequence[str]) -> int:
    """Evaluate or predict as one of the launched processes.

    Returns:
        The exit code: 0 finished, 75 stopped, 2 configuration, 1 failure; ``accelerate launch`` makes 1 of all but 0.
    """
    parser = argparse.ArgumentParser(prog=f"accelerate launch runtime/{act}.py", description=DESCRIPTIONS[act])
    add_inference(parser, act)
    try:
        options = parsed(parser, without_local_rank(arguments))
        environment.check_launched_world_size()
        from runtime import session

        done = (session.evaluate if act == "evaluate" else session.predict)(
            options.source, *options.overrides, **chosen_options(options)
        )
    except LockstepError as error:
        return _tell(error)
    return 0 if done.outcome == "finished" else 75


_FLAG = re.compile(r"--([A-Za-z_]\w*(?:\.\w+)*)(?:=(.*))?", re.DOTALL)

DESCRIPTIONS = {
    "evaluate": "Evaluate a checkpoint of a run, exactly: every sample once, on any number of processes.",
    "predict": "Write a checkpoint's predictions to a file: in the data set's order, each sample once.",
}


def add_inference(parser: argparse.ArgumentParser, act: str) -> None:
    """Add the arguments of ``evaluate`` and ``predict``, the same for the entry point and for ``lockstep``."""
    predicts = act == "predict"
    parser.add_argument("source", metavar="CONFIG|RUN", type=Path, help="YAML file of the run, or its run folder")
    parser.add_argument("overrides", metavar="key.path=value", nargs="*", help="change single keys")
    parser.add_argument(
        "--checkpoint",
        metavar="WHICH",
        default="newest",
        help="newest (the default), best:METRIC, or the path of a checkpoint; its every byte is verified",
    )
    parser.add_argument(
        "--split",
        choices=("train", "validation", "test", "predict"),
        help=f"default: {'predict (prediction.data)' if predicts else 'validation'}, or test where there is none",
    )
    parser.add_argument(
        "--weights", choices=("raw", "averaged"), help="default: those that the run evaluates (averaging.evaluate)"
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        type=Path,
        help=".csv, .jsonl or .parquet (default: predictions.csv in the run folder)"
        if predicts
        else "JSON file to write",
    )
    parser.add_argument("--force", action="store_true", help="write over a file that is there")


def chosen_options(options: argparse.Namespace) -> dict[str, Any]:
    """Return those options that are not overrides, by name."""
    return {name: getattr(options, name) for name in ("checkpoint", "split", "weights", "output", "force")}


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


def _tell(error: LockstepError) -> int:
    rank = environment.rank()
    if isinstance(error, EQUAL_ON_ALL_RANKS) and rank != 0:
        # Rank 0 tells it for all. The launcher ends everyone once the first rank has left, so let rank 0 be that one.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        if signal.sigtimedwait({signal.SIGTERM}, 10) is not None:
            return error.exit_code
    # After all that time rank 0 knows of nothing: then it was this rank's error alone.
    alone = "RANK" in os.environ and (rank != 0 or not isinstance(error, EQUAL_ON_ALL_RANKS))
    print(f"lockstep: {f'rank {rank}: ' if alone else ''}{error}", file=sys.stderr, flush=True)
    return error.exit_code
