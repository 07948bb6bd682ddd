"""``lockstep schema``: write the JSON Schema of the YAML, or all of its keys as a page."""

from __future__ import annotations

import argparse
import json


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to those of ``lockstep``."""
    schema = commands.add_parser("schema", help="write the JSON Schema of the YAML, for editors")
    schema.add_argument("--markdown", action="store_true", help="write a page of all keys, for people, instead")
    schema.set_defaults(run=_schema)


def _schema(options: argparse.Namespace) -> int:
    if options.markdown:
        from runtime.config.reference import markdown

        print(markdown(), end="")
        return 0
    from runtime.config.file import json_schema

    print(json.dumps(json_schema(), indent=2))
    return 0
