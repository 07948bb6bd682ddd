"""A copy of the tree in which tests run with one error in it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.mutants.mutant import Mutant

ROOT = Path(__file__).parents[2]
_LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", ".*_cache", "*.egg-info", ".hypothesis")
_FAILED = re.compile(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", re.MULTILINE)
_END_SESSION = """
import os, signal, sys
sys.stdin.read()  # until its other end is closed, by hand or by the kernel
try:
    os.killpg(int(sys.argv[1]), signal.SIGKILL)
except ProcessLookupError:
    pass
"""
_PASSED, _FAILURES = 0, 1  # pytest's exit codes


@dataclass(frozen=True)
class Verdict:
    """What became of a run of tests.

    Args:
        failed: whether a test failed, or the time was up.
        by: the first test that failed, or "the time limit".
        output: of pytest.
    """

    failed: bool
    by: str
    seconds: float
    output: str


@contextmanager
def ended(process: subprocess.Popen[str]) -> Iterator[None]:
    """End the session of a process behind this block, or when this process ends, killed or not: tests start many others."""
    line = [sys.executable, "-S", "-c", _END_SESSION, str(process.pid)]
    with subprocess.Popen(line, stdin=subprocess.PIPE, start_new_session=True) as guard:
        try:
            yield
        finally:
            assert guard.stdin is not None
            guard.stdin.close()
            guard.wait()
            process.wait()


class Workplace:
    """A copy of the tree; one set of tests runs in it at a time.

    Args:
        folder: where it is made.
        limit_seconds: in which tests have to end; a mutant may hang.
    """

    def __init__(self, folder: Path, *, limit_seconds: float) -> None:
        self._folder, self._limit_seconds = folder, limit_seconds
        shutil.copytree(ROOT, folder, ignore=_LEFT_OUT)

    def run(self, tests: tuple[str, ...], *, limited: bool = True) -> Verdict:
        """Run tests as the tree is.

        Args:
            limited: whether they have to end within the limit.

        Raises:
            RuntimeError: pytest could not run them.
        """
        line = [sys.executable, "-m", "pytest", "-q", "-x", "-rfE", "-p", "no:xdist", "-p", "no:cacheprovider"]
        environment = {
            **os.environ,
            "PYTHONPATH": str(self._folder),
            "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        began = time.monotonic()
        process = subprocess.Popen(
            [*line, "-m", "not long", *tests],
            cwd=self._folder,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        with ended(process):
            try:
                output, _ = process.communicate(timeout=self._limit_seconds if limited else None)
            except subprocess.TimeoutExpired:
                return Verdict(True, "the time limit", time.monotonic() - began, "")
        seconds = time.monotonic() - began
        if process.returncode not in (_PASSED, _FAILURES):
            raise RuntimeError(f"pytest ended with code {process.returncode}:\n{output[-2000:]}")
        found = _FAILED.search(output)
        return Verdict(process.returncode == _FAILURES, found[1] if found else "", seconds, output)

    def run_with(self, mutant: Mutant) -> Verdict:
        """Run a mutant's tests with the mutant in the tree, and take it out again."""
        path = self._folder / mutant.file
        original = path.read_text()
        path.write_text(mutant.applied(original))
        try:
            return self.run(mutant.tests)
        finally:
            path.write_text(original)
