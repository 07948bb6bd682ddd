"""The ``lockstep`` command. Nothing slow is imported before it is needed: ``--help`` and a YAML's mistakes come at once."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launch.node_rendezvous import Place
from runtime.entry import DESCRIPTIONS, add_inference, chosen_options, parsed
from runtime.environment import SlurmStep, slurm_step
from runtime.errors import ConfigurationError, LockstepError, Problem
from runtime.output import protected_output

if TYPE_CHECKING:
    from runtime.config.file import LoadedConfiguration

_STOPPED = (
    "exit code: 0 done; 75 stopped, with nothing written (the same command begins anew); 2 configuration; 1 failure"
)


_ON_A_CLUSTER = {
    "submit": "hand a run to a cluster's scheduler",
    "jobs": "list one's runs in Slurm's queue",
    "stop": "let a run save and leave",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code: 0 done, 75 stopped and to be continued, 2 configuration, 1 failure."""
    with protected_output():
        return _main(arguments)


def _main(arguments: Sequence[str] | None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    try:
        options = parsed(_parser(given[0] if given else ""), given)
        code: int = options.run(options)
    except LockstepError as error:
        print(f"lockstep: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:  # Ctrl-C while this process imports or reads
        print("lockstep: interrupted", file=sys.stderr)
        return 75
    return code


def _parser(command: str) -> argparse.ArgumentParser:
    """Return the parser of all commands; those of a cluster are only named unless one of them is given."""
    parser = argparse.ArgumentParser(
        prog="lockstep", description="Train what one YAML file describes, on any number of processes."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train on this machine, or on several together")
    _add_config(train)
    _add_place(train)
    train.set_defaults(run=_train, act="train")

    doctor = commands.add_parser(
        "doctor",
        help="examine the processes that would train, and the network between them",
        description="Start the processes that would train, and compare what they find: versions, devices, code, disk, shared "
        "memory, the run folder; and time an all-reduce. Names the host that differs.",
        epilog="exit code: 0 all is well; 2 configuration; 1 it is not",
    )
    _add_config(doctor)
    _add_place(doctor)
    doctor.set_defaults(run=_train, act="doctor")

    show = commands.add_parser("show", help="say what a run will be, without running it")
    _add_config(show)
    show.add_argument(
        "--curve",
        metavar="FILE",
        type=Path,
        help="draw the learning rate as a picture (.png, .svg, .pdf; needs matplotlib)",
    )
    show.add_argument("--parameters", action="store_true", help="list every parameter of the model")
    show.set_defaults(run=_show)

    for act, summary in (
        ("evaluate", "evaluate a checkpoint"),
        ("predict", "write a checkpoint's predictions to a file"),
    ):
        inference = commands.add_parser(act, help=summary, description=DESCRIPTIONS[act], epilog=_STOPPED)
        add_inference(inference, act)
        _add_processes(inference)
        inference.set_defaults(run=_infer, act=act)

    if command in _ON_A_CLUSTER:
        from launch.slurm.queue import add_jobs
        from runtime.commands.submit import add_submit

        add_submit(commands)
        add_jobs(commands)
    else:
        for name, summary in _ON_A_CLUSTER.items():
            commands.add_parser(name, help=summary)

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

    export = commands.add_parser(
        "export",
        help="write a checkpoint's weights to a file of their own",
        description="Write the model's state dict to a file that any PyTorch code loads. The checkpoint is verified before, "
        "the file read back after.",
    )
    export.add_argument(
        "checkpoint", metavar="CHECKPOINT", type=Path, help="checkpoint; or run folder: its newest whole one"
    )
    export.add_argument(
        "out", metavar="OUT", type=Path, help="file to write: .safetensors; or .pt or .pth, by torch.save"
    )
    export.add_argument(
        "--weights",
        choices=("raw", "averaged"),
        default="raw",
        help="averaged: the running average, where the YAML's averaging was set (default: raw)",
    )
    export.add_argument("--force", action="store_true", help="write over a file that is there")
    export.set_defaults(run=_export)

    describe = commands.add_parser(
        "describe",
        help="list the arguments of a model, loss, optimizer, schedule, metric, data source or class of your own",
        description="List the arguments of a component, with types and defaults.",
    )
    describe.add_argument("target", metavar="TARGET", help="package.module:Name, or a short name such as AdamW")
    describe.add_argument(
        "config", metavar="CONFIG", nargs="?", type=Path, help="YAML file of a run whose code folder has the module"
    )
    describe.set_defaults(run=_describe)

    schema = commands.add_parser("schema", help="write the JSON Schema of the YAML, for editors")
    schema.set_defaults(run=_schema)
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", type=Path, help="YAML file of the run")
    parser.add_argument("overrides", metavar="key.path=value", nargs="*", help="change single keys")
    _add_processes(parser)


def _add_processes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--processes",
        metavar="N",
        type=_count,
        default=None,
        help="processes on this machine (default: one per GPU, or 1)",
    )


def _add_place(parser: argparse.ArgumentParser) -> None:
    several = parser.add_argument_group(
        "several machines",
        "the same command on each, with its own --node-rank; or none of these in a step of Slurm's with one task on each "
        "machine: srun --ntasks-per-node=1",
    )
    several.add_argument("--nodes", metavar="N", type=_count, help="machines (default: 1)")
    several.add_argument("--node-rank", metavar="R", type=int, help="which of them this is: 0 is the main host")
    several.add_argument("--main-address", metavar="HOST", help="name or address of the main host")
    several.add_argument(
        "--main-port",
        metavar="PORT",
        type=_port,
        help="a free port on it (default: 29500; in a step, from the job's id)",
    )


def _place(options: argparse.Namespace, processes: int) -> Place | None:
    """Return this machine's place among several, None where it is alone.

    Raises:
        ConfigurationError: options that are missing, or mean nothing.
        SchedulerError: Slurm does not say where the first machine is.
    """
    nodes, rank, address = options.nodes or 1, options.node_rank, options.main_address
    if (step := _step(options)) is not None:
        from launch.slurm.step import place_in_step

        return place_in_step(step, processes=processes, port=options.main_port)
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
    return Place(nodes, rank, address, options.main_port or 29500, processes)


def _step(options: argparse.Namespace) -> SlurmStep | None:
    """Return the step of Slurm's that says which machine this is, unless the command line does."""
    said = (options.nodes, options.node_rank, options.main_address)
    return slurm_step() if said == (None, None, None) else None


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _port(text: str) -> int:
    if not text.isdigit() or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(f"must be 1 to 65535, not {text!r}")
    return int(text)


def _train(options: argparse.Namespace) -> int:
    from runtime.config.file import load

    loaded = load(options.config, options.overrides)

    from launch.local import num_gpus, train_locally
    from runtime.build.components import check_components
    from runtime.strategies.zero.launch_check import check_start

    gpus = num_gpus()
    configured = loaded.values.strategy.world_size
    step = _step(options)
    nodes = step.nodes if step is not None else options.nodes or 1
    if configured is not None and configured % nodes:
        what = f"is {configured}, which {nodes} machines cannot share evenly"
        raise ConfigurationError([loaded.problem(("strategy", "world_size"), what)])
    processes = options.processes or (configured or 0) // nodes or max(1, gpus)
    loaded, adopted = _with_settings(
        lambda more: load(options.config, [*options.overrides, *more]), world_size=processes * nodes
    )
    check_components(loaded)
    check_start(loaded)
    return train_locally(
        loaded,
        options.config,
        [*options.overrides, *adopted],
        processes=processes,
        use_gpus=gpus >= processes,
        place=_place(options, processes),
        act=options.act,
    )


def _with_settings(
    read: Callable[[list[str]], LoadedConfiguration], *, world_size: int
) -> tuple[LoadedConfiguration, list[str]]:
    """Adopt settings from this shell's environment, which the launcher's own flags would hide from the processes."""
    from runtime.config.launcher import load_with_settings, overrides

    loaded, settings, notes = load_with_settings(read, os.environ, world_size=world_size)
    for text in notes:
        print(f"lockstep: {text}", file=sys.stderr)
    return loaded, overrides(settings)


def _infer(options: argparse.Namespace) -> int:
    from runtime.config.file import load_run

    loaded = load_run(options.source, options.overrides)

    from launch.local import infer_locally, num_gpus
    from runtime.build.components import check_components
    from runtime.inference.request import Request, check_request

    check_components(loaded)
    chosen = chosen_options(options)
    check_request(loaded, Request(options.act, **chosen))
    flags = [f"--{name}={value}" for name, value in chosen.items() if value is not None and not isinstance(value, bool)]
    flags += ["--force"] if options.force else []
    gpus = num_gpus()
    processes = options.processes or max(1, gpus)
    return infer_locally(
        options.act, options.source, [*options.overrides, *flags], processes=processes, use_gpus=gpus >= processes
    )


def _show(options: argparse.Namespace) -> int:
    from runtime.config.file import load

    loaded = load(options.config, options.overrides)

    from runtime.commands.show import show

    processes = options.processes or loaded.values.strategy.world_size or 1
    show(loaded, processes, picture=options.curve, all_parameters=options.parameters)
    return 0


def _checkpoints(options: argparse.Namespace) -> int:
    from rich.console import Console

    from runtime.checkpoints.inspection import inspect
    from runtime.commands.checkpoints import print_listing

    listing = inspect(options.folder)
    if options.json:
        print(listing.as_json())
    else:
        console = Console(highlight=False)
        if not console.is_terminal:
            console.width = 1000  # nothing is folded on its way to a file or to grep
        print_listing(listing, console)
    return 0 if listing.sound else 1


def _export(options: argparse.Namespace) -> int:
    from runtime.commands.export import export

    done = export(
        options.checkpoint,
        options.out,
        weights=options.weights,
        force=options.force,
        warn=lambda text: print(f"warning: {text}", file=sys.stderr),
    )
    print(f"exported {done}")
    return 0


def _describe(options: argparse.Namespace) -> int:
    from runtime.config.file import load

    code = load(options.config).code if options.config is not None else Path.cwd()

    from runtime.commands.describe import describe

    for line in describe(options.target, code):
        print(line)
    return 0


def _schema(options: argparse.Namespace) -> int:
    from runtime.config.file import json_schema

    print(json.dumps(json_schema(), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
