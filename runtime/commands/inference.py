"""``lockstep evaluate`` and ``lockstep predict``: run a checkpoint's model over a split, on the processes of this machine."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from runtime.commands.machines import add_processes

DESCRIPTIONS = {
    "evaluate": "Evaluate a checkpoint of a run, exactly: every sample once, on any number of processes.",
    "predict": "Write a checkpoint's predictions to a file, in the order of the data set, each sample once.",
}
_EXIT_CODES = "exit code: 0 done; 75 interrupted, no output was written (rerun the command); 2 configuration; 1 failure"


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``evaluate`` and ``predict``."""
    for command, summary in (
        ("evaluate", "evaluate a checkpoint"),
        ("predict", "write a checkpoint's predictions to a file"),
    ):
        parser = commands.add_parser(command, help=summary, description=DESCRIPTIONS[command], epilog=_EXIT_CODES)
        add_inference(parser, command)
        add_processes(parser)
        parser.set_defaults(run=_infer, command=command)


def add_inference(parser: argparse.ArgumentParser, command: str) -> None:
    """Add the arguments of ``evaluate`` and ``predict``, shared by the entry points and by ``lockstep``."""
    predicts = command == "predict"
    parser.add_argument("source", metavar="CONFIG|RUN", type=Path, help="YAML file of the run, or its run folder")
    parser.add_argument("overrides", metavar="key.path=value", nargs="*", help="change single keys")
    parser.add_argument(
        "--checkpoint",
        metavar="WHICH",
        default="newest",
        help="newest (the default), best:METRIC, or the path of a checkpoint; it is verified in full",
    )
    parser.add_argument(
        "--split",
        choices=("train", "validation", "test", "predict"),
        help=f"default: {'predict (prediction.data)' if predicts else 'validation'}, or test if there is none",
    )
    parser.add_argument(
        "--weights", choices=("raw", "averaged"), help="default: the ones the run evaluates (averaging.evaluate)"
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        type=Path,
        help=".csv, .jsonl or .parquet (default: predictions.csv in the run folder)"
        if predicts
        else "JSON file to write",
    )
    parser.add_argument("--force", action="store_true", help="overwrite an existing file")


def chosen_options(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options other than overrides, by name."""
    return {name: getattr(options, name) for name in ("checkpoint", "split", "weights", "output", "force")}


def _infer(options: argparse.Namespace) -> int:
    from runtime.config.file import load_run

    loaded = load_run(options.source, options.overrides)

    from launch.local import infer_locally, num_gpus
    from runtime.build.components import check_components
    from runtime.inference.request import InferenceRequest, check_request

    check_components(loaded)
    chosen = chosen_options(options)
    check_request(loaded, InferenceRequest(options.command, **chosen))
    flags = [f"--{name}={value}" for name, value in chosen.items() if value is not None and not isinstance(value, bool)]
    flags += ["--force"] if options.force else []
    gpus = num_gpus()
    processes = options.processes or max(1, gpus)
    return infer_locally(
        options.command, options.source, [*options.overrides, *flags], processes=processes, use_gpus=gpus >= processes
    )
