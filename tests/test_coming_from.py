"""The other library's half of each page in docs/coming-from trains what ours trains.

Lightning and transformers are installed into a folder of their own, without what they depend on, which is here already or
stands beside them in ``PEERS``. ``LOCKSTEP_PEERS`` names such a folder that is there already.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.documentation import ROOT, environment, files

PEERS = ["lightning", "transformers", "tokenizers", "regex", "typer", "shellingham"]
PAGES = ROOT / "docs" / "coming-from"


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a folder in which the other libraries are installed."""
    if found := os.environ.get("LOCKSTEP_PEERS"):
        return found
    folder = str(tmp_path_factory.mktemp("peers"))
    line = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, *PEERS]
    if subprocess.run(line, capture_output=True, check=False).returncode != 0:
        pytest.skip("the other libraries cannot be installed here")
    return folder


def figures(folder: Path, *line: str, **added: str) -> dict[str, float]:
    """Run one half; return the figures that it prints last."""
    done = subprocess.run(
        line, cwd=folder, env=environment(**added), capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, float] = json.loads([text for text in done.stdout.splitlines() if text.startswith('{"loss')][-1])
    return found


def write(page: str, folder: Path) -> None:
    for name, text in files(PAGES / page).items():
        (folder / name).write_text(text)


def ours(folder: Path, processes: int) -> dict[str, float]:
    """Run our half; return the record of its last evaluation."""
    line = ["lockstep", "train", "digits_job.yaml", "--processes", str(processes)]
    done = subprocess.run(line, cwd=folder, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = (folder / "runs" / "digits_job" / "metrics.jsonl").read_text().splitlines()
    found: dict[str, float] = [r for r in map(json.loads, lines) if r["event"] == "evaluation"][-1]
    return found


def assert_equal(theirs: dict[str, float], mine: dict[str, float]) -> None:
    assert theirs["loss"] == pytest.approx(mine["loss"], rel=1e-4)
    assert theirs["accuracy"] == pytest.approx(mine["accuracy"], abs=1e-6)
    assert (f"{mine['loss']:.4f}", f"{mine['accuracy']:.4f}") == ("0.6005", "0.8417")  # as the pages say


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.long)])
def test_accelerates_loop_trains_what_ours_trains(tmp_path: Path, processes: int) -> None:
    write("accelerate.md", tmp_path)
    theirs = figures(tmp_path, sys.executable, "accelerate_digits.py", ACCELERATE_USE_CPU="true")
    assert_equal(theirs, ours(tmp_path, processes))


@pytest.mark.long
def test_accelerates_loop_trains_something_else_on_two_processes(tmp_path: Path) -> None:
    """As the page says: the last batch of an epoch is filled up with samples from the beginning."""
    write("accelerate.md", tmp_path)
    script = tmp_path / "accelerate_digits.py"
    script.write_text(script.read_text().replace("batch_size=64", "batch_size=32"))
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(script)]
    assert f"{figures(tmp_path, *line, ACCELERATE_USE_CPU='true')['loss']:.4f}" == "0.6069"


@pytest.mark.long
@pytest.mark.parametrize(
    ("page", "script"),
    [("lightning.md", "lightning_digits.py"), ("huggingface-trainer.md", "trainer_digits.py")],
)
def test_the_other_trainer_trains_what_ours_trains(tmp_path: Path, peers: str, page: str, script: str) -> None:
    write(page, tmp_path)
    theirs = figures(tmp_path, sys.executable, script, PYTHONPATH=peers)
    assert_equal(theirs, ours(tmp_path, 1))
