"""What every scheduler is asked alike: the options of ``lockstep submit SCHEDULER``, and the job they describe."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import runtime
from launch.job import JobSpec, is_secret
from runtime.arguments import clock_seconds, count
from runtime.config.file import LoadedConfiguration, flatten, load
from runtime.errors import ConfigurationError, Problem

_USUAL_SECRETS = ("WANDB_API_KEY", "HF_TOKEN")  # passed on where they are set, without being asked


def add_job_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that all schedulers have in common."""
    parser.add_argument("config", metavar="CONFIG", type=Path, help="YAML file of the run")
    parser.add_argument("overrides", metavar="key.path=value", nargs="*", help="change single keys")
    parser.add_argument("--nodes", metavar="N", type=count, default=1, help="machines (default: 1)")
    several = parser.add_mutually_exclusive_group()
    several.add_argument("--gpus-per-node", metavar="N", type=count, help="GPUs of each, one process for each")
    several.add_argument(
        "--processes-per-node", metavar="N", type=count, default=1, help="processes on each, on CPUs (default: 1)"
    )
    parser.add_argument("--time", metavar="H:MM:SS", type=seconds, help="longest time of one start: [D-]H:MM:SS")
    parser.add_argument(
        "--env",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="a variable for the processes; NAME alone takes the value it has here. Secrets (names ending in KEY, TOKEN, "
        "SECRET, PASSWORD) travel apart",
    )
    parser.add_argument(
        "--max-requeues",
        metavar="N",
        type=count,
        help=f"how often it may be started again (default: {JobSpec.max_requeues})",
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be submitted, and submit nothing")


def seconds(text: str) -> int:
    """Parse ``[D-]H:MM:SS``."""
    total = clock_seconds(text)
    if total is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form H:MM:SS or D-H:MM:SS, such as 4:00:00")
    if total < 60:
        raise argparse.ArgumentTypeError(f"{text!r} is less than a minute")
    return total


@dataclass(frozen=True)
class JobVariables:
    """Variables for a job's processes.

    Args:
        plain: what may stand in a script.
        secret: what may not.
    """

    plain: Mapping[str, str]
    secret: Mapping[str, str]


def variables(given: list[str]) -> JobVariables:
    """Sort the variables of ``--env`` into plain and secret ones.

    Raises:
        ConfigurationError: a variable without value is not set here.
    """
    found, problems = {name: os.environ[name] for name in _USUAL_SECRETS if os.environ.get(name)}, []
    for text in given:
        name, equals, value = text.partition("=")
        if not equals and name not in os.environ:
            problems.append(Problem("command line", f"--env {name}", "is not set here; give it a value: NAME=VALUE"))
        found[name] = value if equals else os.environ.get(name, "")
    if problems:
        raise ConfigurationError(problems)
    return JobVariables(
        {name: value for name, value in found.items() if not is_secret(name)},
        {name: value for name, value in found.items() if is_secret(name)},
    )


def checked(options: argparse.Namespace) -> LoadedConfiguration:
    """Read a configuration and check it; the arguments of its components too, where torch is installed.

    Raises:
        ConfigurationError: every mistake found.
    """
    loaded = load(options.config, options.overrides)
    if find_spec("torch") is not None:  # a login node can do without
        from runtime.build.components import check_components

        check_components(loaded)
    return loaded


def described(loaded: LoadedConfiguration, options: argparse.Namespace, given: JobVariables) -> JobSpec:
    """Return the job that a configuration and the common options describe; its run folder is absolute.

    Raises:
        ConfigurationError: what cannot be submitted, all mistakes at once.
    """
    values = loaded.values
    if problems := list(_unfit(loaded, options)):
        raise ConfigurationError(problems)
    return JobSpec(
        script=Path(runtime.__path__[0]) / "train.py",
        config=options.config.resolve(),
        overrides=options.overrides,
        nodes=options.nodes,
        processes_per_node=options.gpus_per_node or options.processes_per_node,
        use_gpus=options.gpus_per_node is not None,
        name=loaded.name,
        run_folder=Path.cwd() / loaded.output,
        working_folder=Path.cwd(),
        environment=given.plain,
        secrets=sorted(given.secret),
        time_limit_seconds=options.time,
        grace_seconds=values.limit.grace_seconds,
        silence_seconds=values.limit.silence_seconds,
        max_requeues=options.max_requeues or JobSpec.max_requeues,
    )


def _unfit(loaded: LoadedConfiguration, options: argparse.Namespace) -> Iterator[Problem]:
    world_size = options.nodes * (options.gpus_per_node or options.processes_per_node)
    configured = loaded.values.strategy.world_size
    if configured is not None and configured != world_size:
        what = f"is {configured}, but {options.nodes} nodes of {world_size // options.nodes} processes are {world_size}"
        yield loaded.where.problem(("strategy", "world_size"), what)
    for key, value in flatten(loaded.values.model_dump()).items():
        if isinstance(value, str) and is_secret(key):
            what = "is a secret, and what is submitted is written to files: read it from a variable, passed by --env"
            yield loaded.where.problem(key.split("."), what)
