"""What is on disk is whole."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.checkpoints.checkpoint import CheckpointFolder, listed
from runtime.checkpoints.load import load_state
from runtime.checkpoints.snapshot import HostBuffers, Snapshot
from runtime.config.sections import BestSection
from runtime.errors import CheckpointError

pytestmark = pytest.mark.single


def folder(
    path: Path, *, keep: int = 10, best: list[BestSection] | None = None, warnings: list[str] | None = None
) -> CheckpointFolder:
    return CheckpointFolder(path, keep=keep, best=best or [], warn=(warnings if warnings is not None else []).append)


def snapshot(step: int, *, attempt: int = 0, training: Any = None, **results: float) -> Snapshot:
    state = {
        "model": {"weight": torch.full((3,), float(step))},
        "training": training or {"progress": {"step": step}},
    }
    return HostBuffers().copy(state, step=step, attempt=attempt, epoch=step, results=results)


def save(checkpoints: CheckpointFolder, step: int, **results: Any) -> Path:
    return checkpoints.write(snapshot(step, **results))


def steps(checkpoints: CheckpointFolder) -> list[int]:
    return [checkpoint.step for checkpoint, _ in listed(checkpoints.folder, checkpoints.rollback_history)]


def test_the_newest_checkpoint_comes_back_bit_for_bit(tmp_path: Path) -> None:
    checkpoints = folder(tmp_path)
    for step in (1, 2, 10):
        save(checkpoints, step, loss=0.5)
    newest = checkpoints.newest()
    assert newest is not None
    assert (newest.step, newest.results) == (10, {"loss": 0.5})
    model, training = load_state(newest.path)
    assert torch.equal(model["weight"], torch.full((3,), 10.0))
    assert training == {"progress": {"step": 10}}


def test_the_newest_and_the_best_of_each_metric_are_kept(tmp_path: Path) -> None:
    best = [BestSection(metric="loss", mode="min"), BestSection(metric="accuracy", mode="max", keep=2)]
    checkpoints = folder(tmp_path, keep=2, best=best)
    for step, loss, accuracy in [
        (1, 0.9, 0.1),
        (2, 0.2, 0.8),
        (3, 0.5, 0.9),
        (4, 0.4, 0.3),
        (5, 0.6, 0.2),
        (6, float("nan"), 0.1),
    ]:
        save(checkpoints, step, loss=loss, accuracy=accuracy)
    assert steps(checkpoints) == [2, 3, 5, 6]
    assert [[c.step for c in checkpoints.best(b)] for b in best] == [[2], [3, 2]]


@pytest.mark.parametrize("file", ["model.safetensors", "training.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_a_damaged_checkpoint_is_moved_aside_and_the_one_before_is_used(tmp_path: Path, file: str, damage: str) -> None:
    warnings: list[str] = []
    checkpoints = folder(tmp_path, warnings=warnings)
    save(checkpoints, 1)
    target = save(checkpoints, 2) / file
    content = bytearray(target.read_bytes())
    if damage == "gone":
        target.unlink()
    else:
        content[len(content) // 2] ^= 255
        target.write_bytes(content if damage == "flipped" else content[:-1])
    newest = checkpoints.newest()
    assert newest is not None
    assert newest.step == 1
    assert "step-00000002" in warnings[0]
    assert steps(checkpoints) == [1]
    assert save(checkpoints, 2).is_dir()


def test_a_checkpoint_of_a_newer_format_is_refused(tmp_path: Path) -> None:
    checkpoints = folder(tmp_path)
    manifest = save(checkpoints, 1) / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "version": 99}))
    state = manifest.with_name("state.json")
    state.write_text(json.dumps({**json.loads(state.read_text()), "version": 99}))
    with pytest.raises(CheckpointError, match="format 99"):
        checkpoints.newest()
    assert steps(checkpoints) == [1]


def test_a_version_that_is_damaged_is_damage_and_no_newer_format(tmp_path: Path) -> None:
    warnings: list[str] = []
    checkpoints = folder(tmp_path, warnings=warnings)
    save(checkpoints, 1)
    manifest = save(checkpoints, 2) / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"version": 1', b'"version": 3'))
    newest = checkpoints.newest()
    assert newest is not None
    assert newest.step == 1
    assert "name different formats" in warnings[0]


@pytest.mark.parametrize("fail_at", range(1, 6))
def test_a_failing_disk_leaves_earlier_checkpoints_and_no_half_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail_at: int
) -> None:
    checkpoints = folder(tmp_path)
    save(checkpoints, 1)
    calls = []
    fsync = os.fsync

    def failing(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == fail_at:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save(checkpoints, 2)
    monkeypatch.undo()
    newest = checkpoints.newest()
    assert newest is not None
    assert newest.step == 1
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_what_a_killed_writer_left_is_ignored_and_cleared(tmp_path: Path) -> None:
    checkpoints = folder(tmp_path)
    save(checkpoints, 1)
    (tmp_path / "step-00000002.partial-abcd").mkdir()
    newest = checkpoints.newest()
    assert newest is not None
    assert newest.step == 1
    checkpoints.clear_partial()
    assert steps(checkpoints) == [1]
    assert len(list(tmp_path.iterdir())) == 1


def test_nothing_that_is_read_is_ever_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = folder(tmp_path)
    save(checkpoints, 1)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("unpickling")

    for name in ("pickle.load", "pickle.loads", "torch.load", "pickle.Unpickler"):
        monkeypatch.setattr(name, refuse)
    newest = checkpoints.newest()
    assert newest is not None
    load_state(newest.path)


def test_a_state_that_cannot_be_saved_leaves_no_half_checkpoint(tmp_path: Path) -> None:
    checkpoints = folder(tmp_path)
    save(checkpoints, 1)
    with pytest.raises(CheckpointError, match="'callback' is a function"):
        checkpoints.write(snapshot(2, training={"callback": save}))
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_an_old_checkpoint_that_cannot_be_removed_costs_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    checkpoints = folder(tmp_path, keep=1, warnings=warnings)
    save(checkpoints, 1)
    rename = os.rename

    def failing(source: Path, target: Path) -> None:
        if Path(source).name == "step-00000001":
            raise OSError(13, "Permission denied")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    save(checkpoints, 2)
    assert steps(checkpoints) == [1, 2]
    assert "Permission denied" in warnings[0]
