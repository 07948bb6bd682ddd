"""Killed at any time in any way, a run comes to the same model: a short form of ``tests/chaos``, and the long one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos.setting import ROOT


def chaos(*arguments: str, seconds: float) -> None:
    """Run it in a process of its own: it adopts its descendants' orphans."""
    line = [sys.executable, "-m", "tests.chaos", *arguments]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_few_kills_of_several_kinds_change_nothing() -> None:
    kinds = ["kill-all", "act", "term-rank", "damage", "kill-rank"]
    chaos("--kills", "4", "--sizes", "1", "2", "--real", "0", *[f"--only={kind}" for kind in kinds], seconds=600)


@pytest.mark.long
def test_a_hundred_kills_of_every_kind_change_nothing(tmp_path: Path) -> None:
    chaos("--kills", "100", "--table", str(tmp_path / "table.md"), seconds=3600)
    print((tmp_path / "table.md").read_text())
