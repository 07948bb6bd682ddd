"""The ``lockstep`` command. Slow imports are deferred, so that ``--help`` and mistakes in a YAML appear at once."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from runtime.arguments import parsed
from runtime.commands import checkpoints, describe, export, inference, schema, show, train
from runtime.errors import LockstepError
from runtime.messages import shown_messages
from runtime.output import protected_output

_COMMANDS = (train, show, inference, checkpoints, export, describe, schema)
_CLUSTER_COMMANDS = {
    "submit": "submit a run to a cluster's scheduler",
    "jobs": "list your runs in the cluster's queue",
    "stop": "ask a run to save a checkpoint and exit",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code: 0 done, 75 stopped and can be resumed, 2 configuration, 1 failure."""
    with protected_output(), shown_messages(always=True):
        return _main(arguments)


def _main(arguments: Sequence[str] | None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        options = parsed(_parser(arguments[0] if arguments else ""), arguments)
        code: int = options.run(options)
    except LockstepError as error:
        print(f"lockstep: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:  # Ctrl-C while this process imports or reads
        print("lockstep: interrupted", file=sys.stderr)
        return 75
    return code


def _parser(command: str) -> argparse.ArgumentParser:
    """Return the parser of all commands; those for clusters get their options only if ``command`` is one of them."""
    parser = argparse.ArgumentParser(
        prog="lockstep", description="Train what one YAML file describes, on any number of processes."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for each in _COMMANDS:
        each.add(commands)
    if command in _CLUSTER_COMMANDS:
        from runtime.commands.jobs import add_jobs
        from runtime.commands.submit import add_submit

        add_submit(commands)
        add_jobs(commands)
    else:
        for name, summary in _CLUSTER_COMMANDS.items():
            commands.add_parser(name, help=summary)
    return parser


if __name__ == "__main__":
    sys.exit(main())
