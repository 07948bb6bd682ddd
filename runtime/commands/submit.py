"""``lockstep submit SCHEDULER``: submit a run to a cluster."""

from __future__ import annotations

import argparse

from launch import schedulers


def add_submit(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the ``submit`` command."""
    submit = commands.add_parser("submit", help="submit a run to a cluster's scheduler")
    names = submit.add_subparsers(required=True, metavar="SCHEDULER")
    for scheduler in schedulers.SCHEDULERS:
        parser = names.add_parser(
            scheduler.name, help=f"submit to {scheduler.title}", description=scheduler.description
        )
        scheduler.add_options(parser)
        parser.set_defaults(run=scheduler.submit)
