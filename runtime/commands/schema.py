"""``lockstep schema``: write the JSON Schema of the YAML."""

from __future__ import annotations

import argparse
import json


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to those of ``lockstep``."""
    schema = commands.add_parser("schema", help="write the JSON Schema of the YAML, for editors")
    schema.set_defaults(run=_schema)


def _schema(options: argparse.Namespace) -> int:
    from runtime.config.file import json_schema

    print(json.dumps(json_schema(), indent=2))
    return 0
