"""``lockstep checkpoints``: list a run's checkpoints and verify every byte of them."""

from __future__ import annotations

import argparse
from pathlib import Path


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to those of ``lockstep``."""
    checkpoints = commands.add_parser(
        "checkpoints",
        help="list a run's checkpoints and verify every byte of them",
        description="List a run's checkpoints: what each holds, whether it is whole, which is the best by which metric, which "
        "a rollback has abandoned, and what damage or a kill has left. Only reads; a run may be writing meanwhile.",
        epilog="exit code: 0 if the newest checkpoint is whole, or there has not been one; 1 if it is damaged or of a newer "
        "format (one that a rollback abandoned does not count), if only damaged ones are left, or if RUN cannot be read",
    )
    checkpoints.add_argument("folder", metavar="RUN", type=Path, help="run folder, or its folder of checkpoints")
    checkpoints.add_argument(
        "--json", action="store_true", help="print all results, sizes in bytes and ages in seconds"
    )
    checkpoints.set_defaults(run=_checkpoints)


def _checkpoints(options: argparse.Namespace) -> int:
    from rich.console import Console

    from runtime.checkpoints.inspection import inspect
    from runtime.commands.checkpoint_table import print_listing

    listing = inspect(options.folder)
    if options.json:
        print(listing.as_json())
    else:
        console = Console(highlight=False)
        if not console.is_terminal:
            console.width = 1000  # nothing is folded on its way to a file or to grep
        print_listing(listing, console)
    return 0 if listing.sound else 1
