"""The mutants still fit the code, and the command tells a killed one from a survivor. All of them: ``make mutants``."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutants.mutant import Mutant
from tests.mutants.workplace import ROOT
from tests.mutants.zoo import MUTANTS

pytestmark = pytest.mark.single


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_applies_to_the_code_as_it_is_and_compiles(mutant: Mutant) -> None:
    assert mutant.problem(ROOT) is None


def test_there_are_mutants_of_every_file_that_holds_a_law() -> None:
    assert len(MUTANTS) >= 40
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    assert len({mutant.file for mutant in MUTANTS}) >= 12


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 2\n", "stands 0 times"),
        ("x = 1\nx = 1\n", "stands 2 times"),
        ("x = 1\n", "does not compile"),
    ],
)
def test_a_mutant_that_no_longer_fits_is_refused(tmp_path: Path, text: str, said: str) -> None:
    mutant = Mutant("one", "law.py", "x = 1", "x = (", ())
    (tmp_path / "law.py").write_text(text)
    assert said in str(mutant.problem(tmp_path))
    with pytest.raises(ValueError, match=said):
        mutant.applied(text)


def test_a_mutant_whose_tests_are_gone_is_refused(tmp_path: Path) -> None:
    (tmp_path / "law.py").write_text("x = 1\n")
    mutant = Mutant("one", "law.py", "x = 1", "x = 2", ("tests/test_gone.py::test_it",))
    assert str(mutant.problem(tmp_path)) == "one: there is no tests/test_gone.py::test_it"


def test_a_runner_that_is_killed_leaves_no_tests_behind() -> None:
    """The session's first process has ended already; what it started has not."""
    tests = (
        "import subprocess, sys; print(subprocess.Popen(['sleep', '600'], stdout=subprocess.DEVNULL).pid, flush=True)"
    )
    runner = (
        "import subprocess, sys\nfrom tests.mutants.workplace import ended\n"
        f"line = [sys.executable, '-S', '-c', {tests!r}]\n"
        "process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True, start_new_session=True)\n"
        "with ended(process):\n    print(process.stdout.readline(), flush=True)\n    sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", runner], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        sleeping = os.pidfd_open(int(process.stdout.readline()))
        process.kill()
    try:
        assert select.select([sleeping], [], [], 60)[0]
    finally:
        os.close(sleeping)
