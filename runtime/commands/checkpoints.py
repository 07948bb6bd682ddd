"""``lockstep checkpoints``: list a run's checkpoints and verify every byte of them."""

from __future__ import annotations

import argparse
from pathlib import Path


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the ``checkpoints`` command."""
    checkpoints = commands.add_parser(
        "checkpoints",
        help="list a run's checkpoints and verify every byte of them",
        description="List a run's checkpoints: step, results, whether each is whole, which is best by which metric, which a "
        "rollback has abandoned, and partial or damaged folders. Read-only; safe while the run is writing.",
        epilog="exit code: 0 if the newest checkpoint is whole, or none has been written yet; 1 if it is damaged or of a newer "
        "format (abandoned ones are ignored), if only damaged ones are left, or if RUN cannot be read",
    )
    checkpoints.add_argument("folder", metavar="RUN", type=Path, help="run folder, or its checkpoints folder")
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
            console.width = 1000  # no wrapped lines in files and pipes
        print_listing(listing, console)
    return 0 if listing.sound else 1
