"""Options of ``lockstep submit SCHEDULER`` common to all schedulers, and the job they describe."""

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

_USUAL_SECRETS = ("WANDB_API_KEY", "HF_TOKEN")  # passed on automatically if set


def add_job_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that all schedulers have in common."""
    parser.add_argument("config", metavar="CONFIG", type=Path, help="YAML file of the run")
    parser.add_argument("overrides", metavar="key.path=value", nargs="*", help="change single keys")
    parser.add_argument("--nodes", metavar="N", type=count, default=1, help="machines (default: 1)")
    several = parser.add_mutually_exclusive_group()
    several.add_argument("--gpus-per-node", metavar="N", type=count, help="GPUs per machine, one process for each")
    several.add_argument(
        "--processes-per-node", metavar="N", type=count, default=1, help="processes per machine, on CPUs (default: 1)"
    )
    parser.add_argument("--time", metavar="H:MM:SS", type=seconds, help="time limit of one start: [D-]H:MM:SS")
    parser.add_argument(
        "--env",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="environment variable for the processes; NAME alone passes its current value. Secrets (names ending in KEY, "
        "TOKEN, SECRET, PASSWORD) are passed separately, not in scripts",
    )
    parser.add_argument(
        "--max-requeues",
        metavar="N",
        type=count,
        help=f"how often the job may be restarted (default: {JobSpec.max_requeues})",
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
    """Environment variables for a job's processes.

    Args:
        plain: variables that may be written to a script.
        secret: variables that must not.
    """

    plain: Mapping[str, str]
    secret: Mapping[str, str]


def variables(arguments: list[str]) -> JobVariables:
    """Split the variables of ``--env`` into plain and secret ones.

    Raises:
        ConfigurationError: a variable without a value is not set in this shell.
    """
    values, problems = {name: os.environ[name] for name in _USUAL_SECRETS if os.environ.get(name)}, []
    for text in arguments:
        name, equals, value = text.partition("=")
        if not equals and name not in os.environ:
            problems.append(Problem("command line", f"--env {name}", "is not set here; give it a value: NAME=VALUE"))
        values[name] = value if equals else os.environ.get(name, "")
    if problems:
        raise ConfigurationError(problems)
    return JobVariables(
        {name: value for name, value in values.items() if not is_secret(name)},
        {name: value for name, value in values.items() if is_secret(name)},
    )


def load_checked(options: argparse.Namespace) -> LoadedConfiguration:
    """Read a configuration and check it; the arguments of its components too if torch is installed.

    Raises:
        ConfigurationError: every mistake found.
    """
    loaded = load(options.config, options.overrides)
    if find_spec("torch") is not None:  # login nodes may not have it
        from runtime.build.components import check_components

        check_components(loaded)
    return loaded


def job_spec(loaded: LoadedConfiguration, options: argparse.Namespace, job_variables: JobVariables) -> JobSpec:
    """Return the job described by a configuration and the common options; its run folder is absolute.

    Raises:
        ConfigurationError: the job cannot be submitted; all mistakes at once.
    """
    values = loaded.values
    if problems := list(_problems(loaded, options)):
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
        environment=job_variables.plain,
        secrets=sorted(job_variables.secret),
        time_limit_seconds=options.time,
        grace_seconds=values.limit.grace_seconds,
        silence_seconds=values.limit.silence_seconds,
        max_requeues=options.max_requeues or JobSpec.max_requeues,
    )


def _problems(loaded: LoadedConfiguration, options: argparse.Namespace) -> Iterator[Problem]:
    world_size = options.nodes * (options.gpus_per_node or options.processes_per_node)
    configured = loaded.values.strategy.world_size
    if configured is not None and configured != world_size:
        what = f"is {configured}, but {options.nodes} nodes with {world_size // options.nodes} processes each make {world_size}"
        yield loaded.where.problem(("strategy", "world_size"), what)
    for key, value in flatten(loaded.values.model_dump()).items():
        if isinstance(value, str) and is_secret(key):
            what = "is a secret, and submissions are written to files: read it from an environment variable, passed by --env"
            yield loaded.where.problem(key.split("."), what)
