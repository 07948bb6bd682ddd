"""``lockstep schema``: print the JSON Schema of the YAML, or a Markdown reference of its keys."""

from __future__ import annotations

import argparse
import json


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the ``schema`` command."""
    schema = commands.add_parser("schema", help="print the JSON Schema of the YAML, for editors")
    schema.add_argument("--markdown", action="store_true", help="print a Markdown reference of all keys instead")
    schema.set_defaults(run=_schema)


def _schema(options: argparse.Namespace) -> int:
    if options.markdown:
        from runtime.config.reference import markdown

        print(markdown(), end="")
        return 0
    from runtime.config.file import json_schema

    print(json.dumps(json_schema(), indent=2))
    return 0
