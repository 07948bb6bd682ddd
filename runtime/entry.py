"""What the entry points share: arguments in, one message and an exit code out, never a traceback for a user's mistake."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from runtime import environment
from runtime.errors import EQUAL_ON_ALL_RANKS, LockstepError


def main(arguments: Sequence[str]) -> int:
    """Train as one of the launched processes; return the exit code: 0 finished or stopped, 2 configuration, 1 failure."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: accelerate launch runtime/train.py CONFIG [key.path=value …]", file=sys.stderr)
        return 0 if arguments else 2
    try:
        environment.check_launched_world_size()  # before torch is imported, which takes seconds
        from runtime.session import train

        train(arguments[0], *arguments[1:])
    except LockstepError as error:
        return _tell(error)
    return 0


def examine(arguments: Sequence[str]) -> int:
    """Examine as one of the launched processes; return the exit code: 0 all is well, 2 configuration, 1 it is not."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: accelerate launch runtime/doctor.py CONFIG [key.path=value …]", file=sys.stderr)
        return 0 if arguments else 2
    from runtime import session

    try:
        examined = session.examine(arguments[0], *arguments[1:])
    except LockstepError as error:
        return _tell(error)
    if environment.rank() == 0:
        from runtime.processes.examination import table

        print(table(examined), flush=True)
    return 0


def infer(act: Literal["evaluate", "predict"], arguments: Sequence[str]) -> int:
    """Evaluate or predict as one of the launched processes.

    Returns:
        The exit code: 0 finished, 75 stopped, 2 configuration, 1 failure; ``accelerate launch`` makes 1 of all but 0.
    """
    parser = argparse.ArgumentParser(prog=f"accelerate launch runtime/{act}.py", description=DESCRIPTIONS[act])
    add_inference(parser, act)
    options = parsed(parser, arguments)
    try:
        environment.check_launched_world_size()
        from runtime import session

        done = (session.evaluate if act == "evaluate" else session.predict)(
            options.source, *options.overrides, **chosen_options(options)
        )
    except LockstepError as error:
        return _tell(error)
    return 0 if done.outcome == "finished" else 75


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
    """Parse a command line on which ``key.path=value`` may also follow options, where argparse gives up on it."""
    options, rest = parser.parse_known_args(arguments)
    for argument in rest:
        if argument.startswith("-") or "=" not in argument or not hasattr(options, "overrides"):
            parser.error(f"unrecognized argument: {argument}")
        options.overrides.append(argument)
    return options


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
