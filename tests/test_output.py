"""Printing never ends a run: pipes, terminals and disks that are gone, whatever prints."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from runtime import cli
from runtime.config import file as config_file
from runtime.output import UnfailingStream, protected_output
from tests.observed import configuration
from tests.test_launch import clean_environment

ROOT = Path(__file__).parent.parent


class Broken(io.StringIO):
    """A stream that fails as the system says."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self._number = number

    def write(self, text: str) -> int:
        raise OSError(self._number, os.strerror(self._number))

    def flush(self) -> None:
        raise OSError(self._number, os.strerror(self._number))


def closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


STREAMS: dict[str, Callable[[], Any]] = {
    "a pipe without a reader": lambda: Broken(errno.EPIPE),
    "a closed terminal": lambda: Broken(errno.EIO),
    "a full disk": lambda: Broken(errno.ENOSPC),
    "a closed stream": closed,
    "none": lambda: None,
}


def log() -> None:
    handler = logging.StreamHandler()
    logging.getLogger("user").addHandler(handler)
    logging.getLogger("user").error("said")
    logging.getLogger("user").removeHandler(handler)


PRINTERS: dict[str, Callable[[], None]] = {
    "print": lambda: print("said", flush=True),
    "print to standard error": lambda: print("said", file=sys.stderr, flush=True),
    "rich": lambda: Console().print("[bold]said"),
    "logging": log,
    "write": lambda: sys.stdout.writelines(["said\n"]),
}


@pytest.fixture
def streams() -> Iterator[Callable[[Any], None]]:
    before = sys.stdout, sys.stderr

    def put(stream: Any) -> None:
        sys.stdout = sys.stderr = stream

    yield put
    sys.stdout, sys.stderr = before


@pytest.mark.parametrize("printer", PRINTERS)
@pytest.mark.parametrize("kind", STREAMS)
def test_what_prints_goes_on_where_nothing_can_be_printed(
    kind: str, printer: str, streams: Callable[[Any], None]
) -> None:
    theirs = STREAMS[kind]()
    streams(theirs)
    with protected_output():
        PRINTERS[printer]()
        assert isinstance(sys.stdout, UnfailingStream)
    assert sys.stdout is theirs


def test_what_can_be_printed_is(capsys: pytest.CaptureFixture[str]) -> None:
    with protected_output():
        print("out")
        print("error", file=sys.stderr)
    assert capsys.readouterr() == ("out\n", "error\n")


@pytest.mark.parametrize("redirection", ["| head -1", ">/dev/full 2>/dev/full", ">&- 2>&-", "2>&1 | true", "<&- >&-"])
def test_a_run_is_trained_to_its_end_whoever_reads_what_it_prints(tmp_path: Path, redirection: str) -> None:
    config = configuration(tmp_path / "run", limit={"steps": 3})
    config["data"]["loader"] = {"num_workers": 1}
    config["data"]["train"] = {"target": "talking:Talking"}
    (tmp_path / "talking.py").write_text(
        "import torch\nfrom torch.utils.data import Dataset\n\n\nclass Talking(Dataset):\n"
        "    def __len__(self):\n        return 48\n\n"
        "    def __getitem__(self, index):\n        print('item', index, flush=True)\n"
        "        return torch.ones(8, dtype=torch.float64), index % 3\n"
    )
    (tmp_path / "tiny.py").write_text((ROOT / "tests" / "project" / "tiny.py").read_text())
    config["code"] = str(tmp_path)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    line = f"{sys.executable} {ROOT / 'runtime' / 'train.py'} {tmp_path / 'run.yaml'} {redirection}"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line}"],
        env=clean_environment(ACCELERATE_USE_CPU="true"),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert json.loads((tmp_path / "run" / "outcome.json").read_text())["outcome"] == "finished"


def test_what_a_terminal_cannot_show_is_replaced() -> None:
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    UnfailingStream(shown).write("epoch 1 ━ …\n")
    shown.flush()
    assert shown.buffer.getvalue() == b"epoch 1 ? ?\n"


def test_ctrl_c_before_a_run_has_begun_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def interrupted(*given: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(config_file, "load", interrupted)
    assert cli.main(["show", str(tmp_path / "x.yaml")]) == 75
    assert capsys.readouterr().err == "lockstep: interrupted\n"
    script = "import sys\nfrom runtime.guarded import guarded\ndef act():\n    raise KeyboardInterrupt\nsys.exit(guarded(act))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stderr) == (75, "lockstep: interrupted\n")
