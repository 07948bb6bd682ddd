"""``lockstep submit``: the schedulers there are. Each has a module with ``add(schedulers)``, which adds its own command."""

from __future__ import annotations

import argparse

from launch.kubernetes import submit as kubernetes
from launch.slurm import submit as slurm

_SCHEDULERS = (slurm, kubernetes)


def add_submit(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``lockstep submit SCHEDULER``."""
    submit = commands.add_parser("submit", help="hand a run to a cluster's scheduler")
    schedulers = submit.add_subparsers(required=True, metavar="SCHEDULER")
    for scheduler in _SCHEDULERS:
        scheduler.add(schedulers)
