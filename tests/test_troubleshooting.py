"""docs/troubleshooting.md: every error class has an entry, and the messages that it quotes are the product's own."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime import errors
from tests.test_launch import clean_environment

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
CLASSES = [
    name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, errors.LockstepError)
]


def entry_of(name: str) -> str:
    (found,) = re.findall(rf"^## {name}\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
    return str(found)


def quoted() -> list[str]:
    """Return the messages on the page, one a line; indented lines continue the one before."""
    blocks = re.findall(r"^```text\n(.*?)^```", PAGE, re.M | re.S)
    return [line for block in blocks for line in block.splitlines() if not line.startswith(" ")]


def templates() -> Iterator[list[str]]:
    """Yield every line of text in the code as its fixed pieces, between which values are filled in."""
    for folder in ("runtime", "launch"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                parts = node.values if isinstance(node, ast.JoinedStr) else [node]
                text = "\0".join(str(part.value) for part in parts if isinstance(part, ast.Constant))
                yield from (line.split("\0") for line in text.splitlines())


def fixed_characters(message: str, template: list[str]) -> int:
    """Return how much of a message is fixed text of a template; the message may stop before the template does."""
    place, found = 0, 0
    for piece in template:
        at = message.find(piece, place)
        if at < 0:
            ends = (size for size in range(len(piece), 0, -1) if message[place:].endswith(piece[:size]))
            return found + next(ends, 0)
        place, found = at + len(piece), found + len(piece)
    return found


@pytest.mark.parametrize("name", CLASSES)
def test_an_error_class_has_an_entry(name: str) -> None:
    entry = entry_of(name)
    assert "```text" in entry or name == "LockstepError"
    assert "**Cure" in entry or "cure**" in entry or re.search(r"^- \*\*", entry, re.M) or name == "LockstepError"


def test_the_exit_codes_are_those_of_the_classes() -> None:
    said = {name for name in CLASSES if "Exit code 2" in entry_of(name)}
    assert said == {name for name in CLASSES if getattr(errors, name).exit_code == 2}


def test_quoted_messages_are_in_the_code() -> None:
    known = [template for template in templates() if sum(map(len, template)) >= 10]
    assert len(quoted()) > 40
    for message in quoted():
        best = max(fixed_characters(message, template) for template in known)
        assert best >= min(18, len(message) // 6), f"{message!r} is no message of the code (any more)"


def test_the_errors_are_caught_as_the_page_says(tmp_path: Path) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=clean_environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [comment.strip() for comment in re.findall(r"# (.*)", code)]


@pytest.mark.long
def test_every_command_runs_as_written(tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for block in re.findall(r"^```console\n(.*?)^```", PAGE, re.M | re.S):
        for line in block.splitlines():
            subprocess.run(line.split(), cwd=ROOT, env=clean_environment(PATH=path), capture_output=True, check=True)


def test_links_of_the_page_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([^)#]+)", PAGE):
        assert (ROOT / "docs" / link).is_file(), link
