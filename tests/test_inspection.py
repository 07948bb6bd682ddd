"""The list of a run's checkpoints says what a start would find, and touches nothing."""

from __future__ import annotations

import io
import json
import os
import re
import secrets
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from runtime.checkpoints import inspection
from runtime.checkpoints.inspection import CheckpointInfo, CheckpointListing, inspect, newest_whole
from runtime.checkpoints.load import damage_of
from runtime.checkpoints.rollback_history import Rollback, RollbackHistory
from runtime.cli import main
from runtime.commands.checkpoint_table import print_listing
from runtime.config.sections import BestSection
from runtime.errors import CheckpointError, RunFolderError
from tests.observed import configuration, observe
from tests.test_checkpoint import folder, save, snapshot


def rolled_back(path: Path, *, attempt: int = 1, to: int) -> None:
    RollbackHistory(path).record(Rollback(attempt, to, to + 1, "the loss jumped", (), 1.0))


def spoil(checkpoint: Path, file: str = "model.safetensors") -> None:
    content = bytearray((checkpoint / file).read_bytes())
    content[-1] ^= 1
    (checkpoint / file).write_bytes(content)


def states(listing: CheckpointListing) -> dict[int, str]:
    return {c.step: ("abandoned " if c.abandoned else "") + c.state for c in listing.checkpoints}


def on_disk(path: Path) -> dict[str, Any]:
    return {
        str(p.relative_to(path)): (p.stat().st_ino, p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else None)
        for p in path.rglob("*")
    }


def shown(listing: CheckpointListing, width: int) -> list[str]:
    out = io.StringIO()
    print_listing(listing, Console(file=out, width=width, highlight=False))
    return [line.rstrip() for line in out.getvalue().splitlines()]


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Steps 1 moved aside, 2 whole, 3 damaged, 4 whole and abandoned, 5 whole in the second attempt, 6 partial."""
    best = [BestSection(metric="loss", mode="min", keep=2), BestSection(metric="accuracy", mode="max")]
    path = tmp_path / "checkpoints"
    checkpoints = folder(path, best=best)
    first = save(checkpoints, 1)
    spoil(first)
    os.rename(first, first.with_name(f"{first.name}.damaged-ab12"))
    save(checkpoints, 2, loss=0.5, accuracy=0.5)
    third = save(checkpoints, 3, loss=0.4, accuracy=0.7)
    checkpoints.write(snapshot(5, attempt=1, loss=0.2, accuracy=0.6))
    save(checkpoints, 4, loss=0.1, accuracy=0.9)
    rolled_back(path, to=3)
    spoil(third)
    partial = path / f"step-00000006-attempt-1.partial-{secrets.token_hex(4)}"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half")
    return tmp_path


def test_each_state_of_a_checkpoint_is_told(mixed: Path) -> None:
    listing = inspect(mixed)
    assert states(listing) == {
        1: "moved aside",
        2: "whole",
        3: "damaged",
        4: "abandoned whole",
        5: "whole",
        6: "partial",
    }
    by_step = {c.step: c for c in listing.checkpoints}
    for step in (1, 3):
        assert by_step[step].problem == "model.safetensors does not match its checksum"
    assert (by_step[2].epoch, by_step[5].attempt, by_step[2].results) == (2, 1, {"loss": 0.5, "accuracy": 0.5})
    files = (mixed / "checkpoints" / by_step[2].name).iterdir()
    assert by_step[2].size_bytes == sum(file.stat().st_size for file in files)
    assert by_step[6].size_bytes == 4


def test_places_are_those_of_best_json_without_the_abandoned(mixed: Path) -> None:
    record = json.loads((mixed / "checkpoints" / "best.json").read_text())
    assert [entry["step"] for entry in record["loss"]] == [4, 5]
    assert [entry["step"] for entry in record["accuracy"]] == [4]
    assert {c.step: dict(c.best_of) for c in inspect(mixed).checkpoints if c.best_of} == {5: {"loss": 1}}


@pytest.mark.parametrize("which", ["run", "checkpoints"])
def test_listing_changes_nothing_and_says_what_a_start_then_does(mixed: Path, which: str) -> None:
    before = on_disk(mixed)
    listing = inspect(mixed if which == "run" else mixed / "checkpoints")
    chosen = newest_whole(mixed if which == "run" else mixed / "checkpoints", warn=lambda text: None)
    assert on_disk(mixed) == before
    assert listing.goes_on_from is not None
    start = folder(mixed / "checkpoints").newest()
    assert start is not None
    assert listing.goes_on_from.name == chosen.path.name == start.path.name


def spoil_newest(path: Path) -> None:
    spoil(max(path.glob("step-*"), key=lambda p: p.name))


def spoilt_and_rolled_back(path: Path) -> None:
    spoil_newest(path)
    rolled_back(path, to=1)


def newer_format(path: Path) -> None:
    manifest = path / "step-00000002" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "version": 99}))
    state = manifest.with_name("state.json")
    state.write_text(json.dumps({**json.loads(state.read_text()), "version": 99}))


def all_aside(path: Path) -> None:
    for checkpoint in list(path.glob("step-*")):
        spoil(checkpoint)
        os.rename(checkpoint, checkpoint.with_name(f"{checkpoint.name}.damaged-ab12"))


def without_manifest(path: Path) -> None:
    (path / "step-00000002" / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("change", "goes_on_from", "exit_code"),
    [
        (lambda path: None, 2, 0),
        (lambda path: spoil(path / "step-00000001"), 2, 0),
        (spoil_newest, 1, 1),
        (without_manifest, 1, 1),
        (newer_format, None, 1),
        (all_aside, None, 1),
        (lambda path: rolled_back(path, to=1), 1, 0),
        (spoilt_and_rolled_back, 1, 0),
        (lambda path: (path / "step-00000003.partial-abcd").mkdir(), 2, 0),
    ],
    ids=["whole", "old damaged", "newest damaged", "no manifest", "newer format", "all moved aside",
         "abandoned", "damaged one abandoned", "partial"],
)  # fmt: skip
def test_the_exit_code_tells_whether_the_newest_is_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Path], Any], goes_on_from: int, exit_code: int
) -> None:
    checkpoints = folder(tmp_path)
    save(checkpoints, 1)
    save(checkpoints, 2)
    change(tmp_path)
    assert main(["checkpoints", str(tmp_path)]) == exit_code
    printed = capsys.readouterr().out
    found = re.search(r"The next start resumes from step-(\d+)\.", printed)
    assert (int(found[1]) if found else None) == goes_on_from
    if change is newer_format:
        assert "step-00000002 has format 99" in printed
        assert "The next start is refused." in printed
        with pytest.raises(CheckpointError, match="format 99"):
            folder(tmp_path).newest()
    else:
        start = folder(tmp_path).newest()
        assert (start.step if start else None) == goes_on_from


def test_the_order_is_that_of_a_start(tmp_path: Path) -> None:
    """The later step, then the later attempt, then the one that was saved again with its results."""
    checkpoints = folder(tmp_path)
    checkpoints.write(snapshot(2, attempt=1))
    save(checkpoints, 3)
    names = [c.name for c in inspect(tmp_path).checkpoints]
    assert names == ["step-00000002-attempt-1", "step-00000003"]
    evaluated = save(checkpoints, 3, loss=0.5)
    goes_on_from = inspect(tmp_path).goes_on_from
    assert goes_on_from is not None
    assert goes_on_from.name == evaluated.name == "step-00000003-evaluated"
    start = checkpoints.newest()
    assert start is not None
    assert start.path == newest_whole(tmp_path, warn=pytest.fail).path == evaluated


def test_a_folder_without_checkpoints_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoints", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path} holds no checkpoints\n"
    assert main(["checkpoints", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["checkpoints"] == []


def test_what_is_no_run_folder_is_refused(mixed: Path) -> None:
    with pytest.raises(RunFolderError, match="there is no folder"):
        inspect(mixed / "elsewhere")
    (mixed / "file").touch()
    with pytest.raises(RunFolderError, match="is not a folder"):
        inspect(mixed / "file")
    (checkpoint,) = mixed.glob("checkpoints/step-00000002*")
    with pytest.raises(RunFolderError, match="is a single checkpoint"):
        inspect(checkpoint)


def test_records_that_cannot_be_read_are_named(mixed: Path) -> None:
    (mixed / "checkpoints" / "best.json").write_text("{")
    listing = inspect(mixed)
    assert any("best.json cannot be read" in line for line in shown(listing, 80))
    assert not any(c.best_of for c in listing.checkpoints)
    (mixed / "checkpoints" / "rollbacks.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"rollbacks\.json cannot be read"):
        inspect(mixed)


def test_json_holds_what_the_table_shows_and_no_nan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints = folder(tmp_path)
    written = save(checkpoints, 7, loss=float("nan"), accuracy=0.25)
    os.utime(written, (1e9, 1e9))
    main(["checkpoints", str(tmp_path), "--json"])
    told = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    (checkpoint,) = told["checkpoints"]
    assert told["goes_on_from"] == checkpoint["name"] == written.name
    assert checkpoint["results"] == {"loss": None, "accuracy": 0.25}
    assert checkpoint["age_seconds"] > 20 * 365 * 86400
    assert checkpoint.keys() == CheckpointInfo.__dataclass_fields__.keys()


@pytest.mark.parametrize("width", [50, 80, 120, 200])
def test_the_table_fits_the_terminal_and_every_name_is_whole(mixed: Path, width: int) -> None:
    listing = inspect(mixed)
    lines = shown(listing, width)
    table = [line for line in lines if not line.startswith(("#1", "abandoned:", "The next start", "columns not"))]
    table = table[: len(table) - 3]  # three remarks, which a terminal wraps
    names = [c.name for c in listing.checkpoints]
    assert not any("…" in line for line in table)
    assert all(len(line) <= max(width, *map(len, names)) for line in table)
    for name in names:
        assert sum(name in line for line in table) == 1
    assert any("accuracy" in line for line in lines)  # as a column, or among those not shown
    text = "\n".join(lines)
    for expected in ("step-00000003", "does not match its checksum", "was moved aside", "is being written"):
        assert expected in text


def test_a_wide_terminal_takes_one_line_for_each(mixed: Path) -> None:
    heading, _, *rows = shown(inspect(mixed), 200)
    columns = ["checkpoint", "step", "epoch", "attempt", "loss", "accuracy", "size", "age", "digest", "state"]
    assert heading.split() == columns
    (row,) = [row for row in rows if row.startswith("step-00000005")]
    cells = row.split()
    assert cells[1:7] == ["5", "5", "1", "0.2", "#1", "0.6"]
    assert cells[-1] == "whole"
    assert re.fullmatch("[0-9a-f]{16}", cells[-2])


def test_results_without_a_best_are_all_shown(tmp_path: Path) -> None:
    checkpoints = folder(tmp_path)
    save(checkpoints, 1, samples=96.0, loss=0.5, f1=0.25)
    assert shown(inspect(tmp_path), 200)[0].split() == [
        "checkpoint",
        "step",
        "epoch",
        "loss",
        "f1",
        "size",
        "age",
        "digest",
        "state",
    ]


def test_a_checkpoint_that_a_run_removes_meanwhile_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run saves step 3 and drops step 1 while step 1 is being verified; its keep is 2."""
    checkpoints = folder(tmp_path, keep=2)
    save(checkpoints, 1)
    save(checkpoints, 2)

    def verifying(path: Path) -> str | None:
        if path.name == "step-00000001":
            save(checkpoints, 3)
        return damage_of(path)

    monkeypatch.setattr(inspection, "damage_of", verifying)
    assert states(inspect(tmp_path)) == {2: "whole", 3: "whole"}


def test_the_newest_whole_one_is_found_though_a_run_removes_it_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints, warnings = folder(tmp_path, keep=1), list[str]()
    save(checkpoints, 1)

    def verifying(path: Path) -> str | None:
        if path.name == "step-00000001":
            save(checkpoints, 2)
        return damage_of(path)

    monkeypatch.setattr(inspection, "damage_of", verifying)
    assert newest_whole(tmp_path, warn=warnings.append).step == 2
    assert warnings == []


def test_a_run_that_saves_all_the_time_is_never_called_damaged(tmp_path: Path) -> None:
    checkpoints, stop = folder(tmp_path, keep=1), threading.Event()
    save(checkpoints, 1)

    def saving() -> None:
        step = 1
        while not stop.is_set():
            step += 1
            save(checkpoints, step)

    writer = threading.Thread(target=saving)
    writer.start()
    try:
        for _ in range(40):
            assert {c.state for c in inspect(tmp_path).checkpoints} <= {"whole", "partial"}
    finally:
        stop.set()
        writer.join()


def test_the_checkpoints_of_a_real_run_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    points = {"target": "tiny:points", "args": {}}
    best = [{"metric": "loss", "mode": "min"}]
    run = observe(
        configuration(
            tmp_path,
            data={"train": points, "validation": {**points, "args": {"split": "validation"}}},
            limit={"steps": 4},
            checkpoint={"every": "1 step", "keep": 4, "best": best},
            evaluation={"every": "2 steps"},
        )
    )
    capsys.readouterr()
    assert main(["checkpoints", str(tmp_path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [c["step"] for c in told["checkpoints"]] == [1, 2, 3, 4]
    assert [c["state"] for c in told["checkpoints"]] == ["whole"] * 4
    assert told["checkpoints"][-1]["results"] == run["results"]
    losses = {c["step"]: c["results"]["loss"] for c in told["checkpoints"] if c["results"]}
    assert [c["step"] for c in told["checkpoints"] if c["best_of"]] == [min(losses, key=lambda step: losses[step])]


def test_big_checkpoints_are_verified_behind_a_bar_on_a_terminal_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save(folder(tmp_path), 1)
    monkeypatch.setattr(inspection, "_BIG_BYTES", 1)
    inspect(tmp_path)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("FORCE_COLOR", "1")
    inspect(tmp_path)
    assert "verifying" in capsys.readouterr().err


def test_help_of_the_command_comes_without_torch() -> None:
    for command in ("checkpoints", "export", "train", "show"):
        code = (
            f"import sys, runtime.cli\ntry: runtime.cli.main([{command!r}, '--help'])\n"
            "except SystemExit: sys.exit(any(name in sys.modules for name in ('torch', 'rich', 'pydantic')))"
        )
        assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
