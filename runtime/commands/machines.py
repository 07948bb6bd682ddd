"""Options for the processes to start: how many on this machine, and which machine of several this is."""

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
    """Add the options for several machines."""
    several = parser.add_argument_group(
        "several machines",
        "run the same command on each machine, with its own --node-rank; inside a Slurm step with one task per machine (srun "
        "--ntasks-per-node=1) none of these options is needed",
    )
    several.add_argument("--nodes", metavar="N", type=count, help="machines (default: 1)")
    several.add_argument("--node-rank", metavar="R", type=int, help="rank of this machine; 0 is the main host")
    several.add_argument("--main-address", metavar="HOST", help="name or address of the main host")
    several.add_argument(
        "--main-port",
        metavar="PORT",
        type=_port,
        help="free port on the main host (default: 29500; in a Slurm step, from the job id)",
    )


def place_of(options: argparse.Namespace, processes: int) -> NodeInfo | None:
    """Return this machine's place among several; None if it is the only one.

    Raises:
        ConfigurationError: options are missing or have no effect.
        SchedulerError: the address of the first machine is unknown.
    """
    nodes, rank, address = options.nodes or 1, options.node_rank, options.main_address
    if (scheduler := _scheduler_of(options)) is not None:
        return scheduler.own_place(processes=processes, port=options.main_port)
    if nodes == 1:
        unused = [f"--{name}" for name, value in (("node-rank", rank), ("main-address", address)) if value is not None]
        if unused:
            raise ConfigurationError([Problem("command line", " ".join(unused), "needs --nodes 2 or more")])
        return None
    problems = []
    if rank is None or not 0 <= rank < nodes:
        problems.append(Problem("command line", "--node-rank", f"must be 0 to {nodes - 1}, different on each machine"))
    if not address:
        problems.append(
            Problem(
                "command line",
                "--main-address",
                "is required: name or address of the main host, as all machines reach it",
            )
        )
    if problems:
        raise ConfigurationError(problems)
    return NodeInfo(nodes, rank, address, options.main_port or 29500, processes)


def step_of(options: argparse.Namespace) -> ClusterStep | None:
    """Return the scheduler's step that this process belongs to; None if there is none or the options name the machine."""
    scheduler = _scheduler_of(options)
    return scheduler.own_step() if scheduler is not None else None


def _scheduler_of(options: argparse.Namespace) -> ClusterScheduler | None:
    place = (options.nodes, options.node_rank, options.main_address)
    return schedulers.scheduler_of_step() if place == (None, None, None) else None


def _port(text: str) -> int:
    if not text.isdigit() or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(f"must be 1 to 65535, not {text!r}")
    return int(text)
