"""``lockstep export``: write a checkpoint's weights to a file of their own."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to those of ``lockstep``."""
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


def _export(options: argparse.Namespace) -> int:
    from runtime.commands.weights_file import export

    done = export(
        options.checkpoint,
        options.out,
        weights=options.weights,
        force=options.force,
        warn=logging.getLogger("lockstep.export").warning,
    )
    print(f"exported {done}")
    return 0
