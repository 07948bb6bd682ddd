"""The ``lockstep`` command. Nothing slow is imported before it is needed: ``--help`` and a YAML's mistakes come at once."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from runtime.entry import DESCRIPTIONS, add_inference, chosen_options, parsed
from runtime.errors import LockstepError

_STOPPED = (
    "exit code: 0 done; 75 stopped, with nothing written (the same command begins anew); 2 configuration; 1 failure"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code: 0 done, 75 stopped and to be continued, 2 configuration, 1 failure."""
    parser = _parser()
    options = parsed(parser, arguments)
    try:
        code: int = options.run(options)
    except LockstepError as error:
        print(f"lockstep: {error}", file=sys.stderr)
        return error.exit_code
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lockstep", description="Train what one YAML file describes, on any number of processes."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train on this machine")
    _add_config(train)
    train.set_defaults(run=_train)

    show = commands.add_parser("show", help="say what a run will be, without running it")
    _add_config(show)
    show.add_argument(
        "--curve",
        metavar="FILE",
        type=Path,
        help="draw the learning rate as a picture (.png, .svg, .pdf; needs matplotlib)",
    )
    show.set_defaults(run=_show)

    for act, summary in (
        ("evaluate", "evaluate a checkpoint"),
        ("predict", "write a checkpoint's predictions to a file"),
    ):
        inference = commands.add_parser(act, help=summary, description=DESCRIPTIONS[act], epilog=_STOPPED)
        add_inference(inference, act)
        _add_processes(inference)
        inference.set_defaults(run=_infer, act=act)

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


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of processes")
    return int(text)


def _train(options: argparse.Namespace) -> int:
    from runtime.config.file import load

    loaded = load(options.config, options.overrides)

    from runtime.assembly import check_components
    from runtime.processes.launching import num_gpus, train_locally
    from runtime.strategies.zero_launch import check_start

    check_components(loaded)
    check_start(loaded)
    gpus = num_gpus()
    processes = options.processes or loaded.values.strategy.world_size or max(1, gpus)
    return train_locally(loaded, options.config, options.overrides, processes=processes, use_gpus=gpus >= processes)


def _infer(options: argparse.Namespace) -> int:
    from runtime.config.file import load_run

    loaded = load_run(options.source, options.overrides)

    from runtime.assembly import check_components
    from runtime.inference.request import Request, check_request
    from runtime.processes.launching import infer_locally, num_gpus

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

    from runtime.show import show

    show(loaded, options.processes or loaded.values.strategy.world_size or 1, picture=options.curve)
    return 0


def _checkpoints(options: argparse.Namespace) -> int:
    from rich.console import Console

    from runtime.checkpoints.inspection import inspect
    from runtime.checkpoints.table import print_listing

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
    from runtime.checkpoints.export import export

    done = export(
        options.checkpoint,
        options.out,
        weights=options.weights,
        force=options.force,
        warn=lambda text: print(f"warning: {text}", file=sys.stderr),
    )
    print(f"exported {done}")
    return 0


def _schema(options: argparse.Namespace) -> int:
    from runtime.config.file import json_schema

    print(json.dumps(json_schema(), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
