"""Saving behind the loop: what is written is the state of the save's step, errors come out, names tell what is best."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.checkpoints import checkpoint, serialization
from runtime.checkpoints.async_save import AsyncSaver
from runtime.checkpoints.checkpoint import CheckpointFolder, listed
from runtime.checkpoints.load import load_state
from runtime.checkpoints.rollback_history import Rollback, RollbackHistory
from runtime.checkpoints.snapshot import HostBuffers
from runtime.config.sections import BestSection
from runtime.data.batches import Cursor
from runtime.errors import CheckpointError, RunFolderError
from runtime.state.durable_files import write_durably
from tests.observed import configuration, observe
from tests.process_pool import ProcessPool

single = pytest.mark.single


def folder(path: Path, **options: Any) -> CheckpointFolder:
    return CheckpointFolder(path, **{"keep": 10, "best": [], "warn": pytest.fail, **options})


def of_step(step: int, **results: float) -> dict[str, Any]:
    return {"step": step, "attempt": 0, "epoch": 1, "results": results}


@single
def test_what_is_written_is_the_state_at_the_save_whatever_training_does_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, reached = threading.Event(), threading.Event()
    write_tensors = serialization.write_tensors

    def waiting(path: Path, tensors: Any) -> Any:
        reached.set()
        assert go.wait(30)
        return write_tensors(path, tensors)

    monkeypatch.setattr(checkpoint, "write_tensors", waiting)
    weight = torch.arange(6.0).view(2, 3)
    state = {"model": {"weight": weight, "transposed": weight.t()}, "training": {"progress": {"step": 1}}}
    saving = AsyncSaver(folder(tmp_path))
    saving.prepare(state)
    saving.save(state, **of_step(1))
    assert reached.wait(30)
    weight.fill_(-1.0)  # the next step
    assert saving.writing
    assert not list(tmp_path.glob("step-00000001"))
    go.set()
    saving.wait()
    assert saving.problem is None
    model, _ = load_state(tmp_path / "step-00000001")
    assert torch.equal(model["weight"], torch.arange(6.0).view(2, 3))
    assert torch.equal(model["transposed"], torch.arange(6.0).view(2, 3).t())
    saving.save(state, **of_step(2))
    saving.wait()
    assert torch.equal(load_state(tmp_path / "step-00000002")[0]["weight"], weight)
    assert torch.equal(load_state(tmp_path / "step-00000001")[0]["weight"], torch.arange(6.0).view(2, 3))


@single
def test_buffers_follow_a_state_that_changes_its_shapes() -> None:
    buffers = HostBuffers()
    buffers.prepare({"model": {"weight": torch.zeros(3)}})
    for state in (torch.ones(3), torch.ones(2, 2, dtype=torch.float64), torch.ones(())):
        snapshot = buffers.copy({"model": {"weight": state}}, **of_step(1))
        assert torch.equal(snapshot.tensors["model"]["weight"], state)
        assert snapshot.tensors["model"]["weight"].data_ptr() != state.data_ptr()


@single
def test_one_save_waits_for_the_one_before_and_none_follows_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once: list[int] = []
    most: list[int] = []
    write = CheckpointFolder.write

    def counting(self: Any, snapshot: Any, writers: Any) -> Path:
        at_once.append(snapshot.step)
        most.append(len(at_once))
        if snapshot.step == 3:
            raise CheckpointError("the disk is gone")
        path = write(self, snapshot, writers)
        at_once.pop()
        return path

    monkeypatch.setattr(CheckpointFolder, "write", counting)
    saving = AsyncSaver(folder(tmp_path))
    for step in (1, 2, 3, 4):
        saving.save({"model": {"weight": torch.zeros(2)}, "training": {}}, **of_step(step))
    saving.wait()
    assert most == [1, 1, 1]
    assert saving.problem == "the disk is gone"


def failing_run(config: dict[str, Any]) -> str:
    """Train where the second checkpoint's files cannot be written."""
    written: list[str] = []

    def full(path: Path, *parts: Any) -> Any:
        written.append(path.name)
        if written.count("manifest.json") == 2:
            raise OSError(28, os.strerror(28))
        return write_durably(path, *parts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "write_durably", full)
        try:
            observe(config)
        except CheckpointError as error:
            return str(error)
    return "trained"


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=single), 3])
def test_a_save_that_failed_behind_the_loop_ends_the_run_on_every_rank(
    pool: ProcessPool, tmp_path: Path, world_size: int
) -> None:
    config = configuration(tmp_path, limit={"steps": 10_000}, checkpoint={"every": "2 steps"})
    replies = pool.run(failing_run, world_size, config)
    assert set(replies) == {replies[0]}
    assert replies[0].startswith("step 4 could not be saved to")
    assert "No space left on device" in replies[0]
    assert [c.step for c, _ in listed(tmp_path / "checkpoints", RollbackHistory(tmp_path / "checkpoints"))] == [2]


@single
def test_another_owner_of_the_folder_keeps_a_checkpoint_from_its_final_name(tmp_path: Path) -> None:
    def taken_over() -> None:
        raise RunFolderError("was taken over")

    saving = AsyncSaver(folder(tmp_path, before_commit=taken_over))
    saving.save({"model": {}, "training": {}}, **of_step(1))
    saving.wait()
    assert saving.problem == "was taken over"
    assert list(tmp_path.iterdir()) == []


@single
def test_the_best_checkpoints_bear_epoch_and_value_and_are_recorded(tmp_path: Path) -> None:
    best = [BestSection(metric="loss", mode="min"), BestSection(metric="top/1", mode="max")]
    checkpoints = folder(tmp_path, keep=1, best=best)
    for step, loss, top in [(1, 0.5, 0.1), (2, 0.25, 0.9), (3, 0.75, 0.2)]:
        results = {"loss": loss, "top/1": top}
        state: dict[str, Any] = {"model": {}, "training": {}}
        checkpoints.write(HostBuffers().copy(state, step=step, attempt=0, epoch=step, results=results))
    names = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    assert names == ["step-00000002-epoch-2-loss-0.25-top_1-0.9", "step-00000003"]
    record = json.loads((tmp_path / "best.json").read_text())
    assert record["loss"] == [{"checkpoint": names[0], "value": 0.25, "step": 2, "epoch": 2}]
    assert [(found.step, found.epoch) for found in checkpoints.best(best[1])] == [(2, 2)]


@single
def test_a_checkpoint_that_was_left_unevaluated_is_replaced_by_the_evaluated_one(tmp_path: Path) -> None:
    checkpoints = folder(tmp_path, keep=1)
    state: dict[str, Any] = {"model": {}, "training": {}}
    for results in ({}, {"loss": 0.5}, {"loss": 0.5}):
        checkpoints.write(HostBuffers().copy(state, step=1, attempt=0, epoch=1, results=results))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001-evaluated"]
    newest = checkpoints.newest()
    assert newest is not None
    assert newest.results == {"loss": 0.5}


@single
def test_abandoned_checkpoints_are_not_read_and_go_with_the_next_save(tmp_path: Path) -> None:
    checkpoints = folder(tmp_path)
    state: dict[str, Any] = {"model": {}, "training": {}}
    for step in (1, 2, 3):
        checkpoints.write(HostBuffers().copy(state, **of_step(step, loss=float(-step))))
    checkpoints.rollback_history.record(Rollback(1, 1, 4, "NaN", (Cursor(0, 3),), 0.5))
    again = folder(tmp_path)
    newest, (best,) = again.newest(), again.best(BestSection(metric="loss", mode="min"))
    assert newest is not None
    assert (newest.step, best.step) == (1, 1)
    assert again.rollback_history.rollbacks == checkpoints.rollback_history.rollbacks
    again.write(HostBuffers().copy(state, step=2, attempt=1, epoch=1, results={}))
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["step-00000001", "step-00000002-attempt-1"]


@single
def test_a_record_of_rollbacks_that_cannot_be_read_is_no_licence_to_read_what_they_abandoned(tmp_path: Path) -> None:
    (tmp_path / "rollbacks.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"rollbacks\.json cannot be read"):
        folder(tmp_path)
