"""``lockstep show``: dry run, which prints what a run would do."""

from __future__ import annotations

import argparse
from pathlib import Path

from runtime.commands.machines import add_config


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the ``show`` command."""
    show = commands.add_parser("show", help="dry run: print what a run would do")
    add_config(show)
    show.add_argument(
        "--curve",
        metavar="FILE",
        type=Path,
        help="plot the learning rate to a file (.png, .svg, .pdf; needs matplotlib)",
    )
    show.add_argument("--parameters", action="store_true", help="list every parameter of the model")
    show.set_defaults(run=_show)


def _show(options: argparse.Namespace) -> int:
    from runtime.config.file import load

    loaded = load(options.config, options.overrides)

    from runtime.commands.dry_run import show

    processes = options.processes or loaded.values.strategy.world_size or 1
    show(loaded, processes, picture=options.curve, all_parameters=options.parameters)
    return 0
