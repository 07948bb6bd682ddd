"""``lockstep train`` and ``lockstep doctor``: start a run's processes on this machine, alone or as one of several."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from runtime.commands.machines import add_config, add_place, place_of, step_of

if TYPE_CHECKING:
    from runtime.config.file import LoadedConfiguration

_LOGGER = logging.getLogger("lockstep.launch")


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``train`` and ``doctor``."""
    train = commands.add_parser("train", help="train on this machine, or on several together")
    doctor = commands.add_parser(
        "doctor",
        help="check the processes that would train, and the network between them",
        description="Start the processes that would train; compare versions, devices, code, disk, shared memory and access to "
        "the run folder between them; and time an all-reduce. Names the host that differs.",
        epilog="exit code: 0 no problems; 2 configuration; 1 problems found",
    )
    for command, parser in (("train", train), ("doctor", doctor)):
        add_config(parser)
        add_place(parser)
        parser.set_defaults(run=_start, command=command)


def _start(options: argparse.Namespace) -> int:
    from runtime.config.file import load

    loaded = load(options.config, options.overrides)

    from launch.local import num_gpus, train_locally
    from runtime.build.components import check_components
    from runtime.strategies.zero.requirements import check_requirements

    gpus = num_gpus()
    configured = loaded.values.strategy.world_size
    step = step_of(options)
    nodes = step.nodes if step is not None else options.nodes or 1
    if configured is not None and configured % nodes:
        what = f"is {configured}, which is not divisible by {nodes} machines"
        raise loaded.where.error(("strategy", "world_size"), what)
    processes = options.processes or (configured or 0) // nodes or max(1, gpus)
    loaded, adopted = _with_settings(
        lambda more: load(options.config, [*options.overrides, *more]), world_size=processes * nodes
    )
    check_components(loaded)
    check_requirements(loaded.values.strategy)
    return train_locally(
        loaded,
        options.config,
        [*options.overrides, *adopted],
        processes=processes,
        use_gpus=gpus >= processes,
        place=place_of(options, processes),
        entry_point=options.command,
    )


def _with_settings(
    read: Callable[[list[str]], LoadedConfiguration], *, world_size: int
) -> tuple[LoadedConfiguration, list[str]]:
    """Adopt settings from this shell's environment, which the launcher's flags would hide from the processes."""
    from runtime.config.launcher import load_with_settings, overrides

    loaded, settings, notes = load_with_settings(read, os.environ, world_size=world_size)
    for text in notes:
        _LOGGER.info(text)
    return loaded, overrides(settings)
