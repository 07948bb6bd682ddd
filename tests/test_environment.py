"""The list of environment variables in ``runtime/environment.py`` is complete."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

from runtime import environment

ROOT = Path(__file__).parent.parent
FILES = [path for folder in ("runtime", "launch") for path in sorted((ROOT / folder).rglob("*.py"))]
LISTED = re.findall(r"\b[A-Z][A-Z0-9_]*\*?", environment.__doc__ or "")


def variables_in(path: Path) -> Iterator[str]:
    """Yield the names that a file looks up in, takes out of or puts into ``os.environ``."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "os.environ":
            yield from _text(node.slice)
        elif isinstance(node, ast.Call) and node.args and re.fullmatch(r"os\.environ\.\w+", ast.unparse(node.func)):
            yield from _text(node.args[0])
        elif isinstance(node, ast.Compare) and "os.environ" in map(ast.unparse, node.comparators):
            yield from _text(node.left)


def _text(node: ast.expr) -> Iterator[str]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_variable_that_is_named_in_the_code_is_in_the_list(path: Path) -> None:
    unlisted = {name for name in variables_in(path) if not any(fnmatch(name, pattern) for pattern in LISTED)}
    assert not unlisted
