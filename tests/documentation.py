"""The pages of the manual, README included, as tests read them.

Conventions: a block ``console`` holds commands that run as written in a checkout, one a line; a block ``sh`` holds those
that need a cluster, Docker or another library. A block that begins with ``# name.ext`` is a file beside them. Every block
``yaml`` is a configuration, or sections of one.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import yaml

from tests.test_launch import clean_environment

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_FILE_NAME = re.compile(r"# ([\w./-]+\.(?:py|yaml))\b")


class Block(NamedTuple):
    """A fenced block of a page."""

    page: Path
    language: str
    text: str

    @property
    def file_name(self) -> str | None:
        """Name of the file that the block is, if it is one."""
        found = _FILE_NAME.match(self.text)
        return found[1] if found else None


def blocks(page: Path, language: str) -> list[Block]:
    """Return the blocks of a page in one language, in order."""
    return [Block(page, language, text) for text in re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.S)]


def all_blocks(language: str) -> list[Block]:
    """Return the blocks of all pages in one language."""
    return [block for page in PAGES for block in blocks(page, language)]


def files(page: Path) -> dict[str, str]:
    """Return the files that a page shows: name and content."""
    shown = [block for language in ("python", "yaml") for block in blocks(page, language)]
    return {block.file_name: block.text for block in shown if block.file_name is not None}


def commands(page: Path, language: str = "console") -> list[str]:
    """Return the commands of a page, one a line; what ``make`` does is tested by doing it."""
    lines = [line for block in blocks(page, language) for line in block.text.splitlines() if line]
    return [line for line in lines if not line.startswith("make ")]


def sections(text: str) -> Iterator[dict[str, object]]:
    """Yield a YAML block's content; one mapping for each time that a top-level key is repeated."""
    pieces = [piece for piece in re.split(r"^(?=\w)", text, flags=re.M) if re.match(r"\w", piece)]
    keys = [piece.partition(":")[0] for piece in pieces]
    if len(set(keys)) == len(keys):
        yield yaml.safe_load(text)
    else:
        yield from (yaml.safe_load(piece) for piece in pieces)


def environment(**added: str) -> dict[str, str]:
    """Return the environment of a reader's shell, in which ``lockstep`` is found."""
    return clean_environment(PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", **added)


def page_name(page: Path) -> str:
    """Return what a page is called in a test's name."""
    return str(page.relative_to(ROOT))
