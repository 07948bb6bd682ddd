"""``lockstep export``: write a checkpoint's weights to a separate file."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the ``export`` command."""
    export = commands.add_parser(
        "export",
        help="write a checkpoint's weights to a safetensors or torch file",
        description="Write the model's state dict to a file that any PyTorch code can load. The checkpoint is verified first; "
        "the written file is read back and compared.",
    )
    export.add_argument(
        "checkpoint", metavar="CHECKPOINT", type=Path, help="checkpoint; or run folder, for its newest whole one"
    )
    export.add_argument(
        "out", metavar="OUT", type=Path, help="file to write: .safetensors, or .pt or .pth for torch.save"
    )
    export.add_argument(
        "--weights",
        choices=("raw", "averaged"),
        default="raw",
        help="averaged: the running average, if the YAML sets averaging (default: raw)",
    )
    export.add_argument("--force", action="store_true", help="overwrite an existing file")
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
