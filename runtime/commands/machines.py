"""Which processes a command starts: how many on this machine, and which machine of several this is."""

from __future__ import annotations

import argparse
from pathlib import Path

from launch import schedulers
from launch.cluster_scheduler import ClusterScheduler, ClusterStep
from launch.node_rendezvous import NodeInfo
from runtime.arguments import count
from runtime.errors import ConfigurationError, Problem


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add CONFIG, overrides of its keys, and ``--processes``."""
    parser.add_argument("config", metavar="CONFIG", type=Path, help="YAML file of the run")
    parser.add_argument("overrides", metavar="key.path=value", nargs="*", help="change single keys")
    add_processes(parser)


def add_processes(parser: argparse.ArgumentParser) -> None:
    """Add ``--processes``."""
    parser.add_argument(
        "--processes",
        metavar="N",
        type=count,
        default=None,
        help="processes on this machine (default: one per GPU, or 1)",
    )


def add_place(parser: argparse.ArgumentParser) -> None:
    """Add the options of several machines."""
    several = parser.add_argument_group(
        "several machines",
        "the same command on each, with its own --node-rank; or none of these in a step of Slurm's with one task on each "
        "machine: srun --ntasks-per-node=1",
    )
    several.add_argument("--nodes", metavar="N", type=count, help="machines (default: 1)")
    several.add_argument("--node-rank", metavar="R", type=int, help="which of them this is: 0 is the main host")
    several.add_argument("--main-address", metavar="HOST", help="name or address of the main host")
    several.add_argument(
        "--main-port",
        metavar="PORT",
        type=_port,
        help="a free port on it (default: 29500; in a step, from the job's id)",
    )


def place_of(options: argparse.Namespace, processes: int) -> NodeInfo | None:
    """Return this machine's place among several, None where it is alone.

    Raises:
        ConfigurationError: options that are missing, or mean nothing.
        SchedulerError: the scheduler does not say where the first machine is.
    """
    nodes, rank, address = options.nodes or 1, options.node_rank, options.main_address
    if (scheduler := _scheduler_of(options)) is not None:
        return scheduler.own_place(processes=processes, port=options.main_port)
    if nodes == 1:
        given = [f"--{name}" for name, value in (("node-rank", rank), ("main-address", address)) if value is not None]
        if given:
            raise ConfigurationError([Problem("command line", " ".join(given), "needs --nodes 2, or more")])
        return None
    problems = []
    if rank is None or not 0 <= rank < nodes:
        problems.append(Problem("command line", "--node-rank", f"must be 0 to {nodes - 1}, another on each machine"))
    if not address:
        problems.append(
            Problem("command line", "--main-address", "is required: the main host, as all machines know it")
        )
    if problems:
        raise ConfigurationError(problems)
    return NodeInfo(nodes, rank, address, options.main_port or 29500, processes)


def step_of(options: argparse.Namespace) -> ClusterStep | None:
    """Return the scheduler's step that says which machine this is, unless the command line does."""
    scheduler = _scheduler_of(options)
    return scheduler.own_step() if scheduler is not None else None


def _scheduler_of(options: argparse.Namespace) -> ClusterScheduler | None:
    said = (options.nodes, options.node_rank, options.main_address)
    return schedulers.scheduler_of_step() if said == (None, None, None) else None


def _port(text: str) -> int:
    if not text.isdigit() or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(f"must be 1 to 65535, not {text!r}")
    return int(text)
