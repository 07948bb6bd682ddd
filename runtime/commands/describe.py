"""``lockstep describe``: list the arguments of a component."""

from __future__ import annotations

import argparse
from pathlib import Path


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the ``describe`` command."""
    describe = commands.add_parser(
        "describe",
        help="list the arguments of a model, loss, optimizer, schedule, metric, data source or your own class",
        description="List the arguments of a component, with types and defaults.",
    )
    describe.add_argument("target", metavar="TARGET", help="package.module:Name, or a short name such as AdamW")
    describe.add_argument(
        "config", metavar="CONFIG", nargs="?", type=Path, help="YAML file of a run whose code folder holds the module"
    )
    describe.set_defaults(run=_describe)


def _describe(options: argparse.Namespace) -> int:
    from runtime.config.file import load

    code = load(options.config).code if options.config is not None else Path.cwd()

    from runtime.commands.component_arguments import describe

    for line in describe(options.target, code):
        print(line)
    return 0
