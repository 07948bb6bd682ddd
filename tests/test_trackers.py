"""Trackers of the user's own: what they are called with, and that one which fails ends no run."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from runtime.errors import ConfigurationError
from runtime.session import train
from tests.observed import configuration, observe
from tests.process_pool import ProcessPool

TENSORBOARD = "tensorboard_tracker:TensorBoard"


def tracked(folder: Path, *trackers: Any, **changes: Any) -> dict[str, Any]:
    points = {"target": "tiny:points", "args": {"size": 64}}
    config = configuration(
        folder,
        data={"train": points, "validation": {"target": "tiny:points", "args": {"split": "validation", "size": 30}}},
        evaluation={"every": "2 steps"},
        **{"limit": {"steps": 4}, **changes},
    )
    config["reporting"]["trackers"] = [*trackers]
    return config


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def recorded(folder: Path) -> dict[str, dict[int, float]]:
    """Return the losses in ``metrics.jsonl`` by split and step."""
    found: dict[str, dict[int, float]] = {"train": {}, "validation": {}}
    for record in lines(folder / "metrics.jsonl"):
        if record["event"] in ("train", "evaluation"):
            found[record.get("split", "train")][record["step"]] = record["loss"]
    return found


def messages(folder: Path) -> list[str]:
    return [record["text"] for record in lines(folder / "metrics.jsonl") if record["event"] == "message"]


def test_a_tracker_gets_what_metrics_jsonl_gets_on_rank_0_alone(pool: ProcessPool, tmp_path: Path) -> None:
    pool.run(observe, 2, tracked(tmp_path, "tiny_trackers:Noting", seed=7))
    calls = lines(tmp_path / "calls.jsonl")
    assert [call["method"] for call in calls] == [
        "start", "log_artifact", "log_summary", *["log"] * 2, "log", *["log"] * 2, "log", "finish",
    ]  # fmt: skip
    assert (calls[0]["name"], calls[0]["step"], calls[0]["seed"]) == ("run", 0, 7)
    assert calls[1] == {"method": "log_artifact", "name": "config", "step": 0}
    assert calls[2]["world_size"] == 2
    logged = [call for call in calls if call["method"] == "log"]
    assert [(call["split"], call["step"]) for call in logged] == [
        ("train", 1), ("train", 2), ("validation", 2), ("train", 3), ("train", 4), ("validation", 4),
    ]  # fmt: skip
    for split, losses in recorded(tmp_path).items():
        assert {call["step"]: call["values"]["loss"] for call in logged if call["split"] == split} == losses
    assert calls[-1]["outcome"] == "finished"


def test_a_tracker_gets_pictures_and_tables_and_messages(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    classes = {"task": "multiclass", "num_classes": 3}
    config = tracked(
        tmp_path, {"target": "tiny_trackers:Noting"}, {"target": "tiny_trackers:Failing", "args": {"method": "log"}}
    )
    config["evaluation"]["metrics"] = {
        "confusion": {"target": "ConfusionMatrix", "args": classes},
        "recall": {"target": "Recall", "args": {**classes, "average": "none"}},
    }
    train(config)
    calls = lines(tmp_path / "calls.jsonl")
    assert [(c["name"], c["step"], c["split"]) for c in calls if c["method"] == "log_figure"] == [
        ("confusion", step, "validation") for step in (2, 4)
    ]
    tables = [(c["name"], c["step"]) for c in calls if c["method"] == "log_artifact" and c["name"] != "config"]
    assert tables == [("validation/classes", 2), ("validation/classes", 4)]
    assert [c["text"] for c in calls if c["method"] == "log_message"] == messages(tmp_path)


@pytest.mark.parametrize("method", ["__init__", "start", "log_summary", "log", "log_artifact", "log_message", "finish"])
def test_a_tracker_that_fails_is_warned_of_once_and_the_run_goes_on(
    tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    failing = {"target": "tiny_trackers:Failing", "args": {"method": method}}
    other = {"target": "tiny_trackers:Failing", "args": {"method": "log"}}  # its warning is a message
    config = tracked(tmp_path, failing, *([other] if method == "log_message" else []), "tiny_trackers:Noting")
    assert train(config).outcome == "finished"
    expected = "Failing stopped working (OSError: no server); continuing without it"
    if method == "__init__":
        expected = "reporting.trackers.0"
    assert capsys.readouterr().out.count(expected) == (2 if method == "log_message" else 1)
    assert lines(tmp_path / "calls.jsonl")[-1] == {"method": "finish", "outcome": "finished"}
    assert sorted(recorded(tmp_path)["train"]) == [1, 2, 3, 4]


def test_what_is_no_tracker_is_warned_of(tmp_path: Path) -> None:
    assert train(tracked(tmp_path, "tiny_trackers:made")).outcome == "finished"
    (text,) = messages(tmp_path)
    assert text.startswith("warning: reporting.trackers: tiny_trackers:made returned a object")


@pytest.mark.parametrize(
    ("tracker", "what"),
    [
        ("tiny_trackers:Nothing", "has no 'Nothing'"),
        ("tiny_trackers:NoTracker", "does not extend lockstep.Tracker"),
        ({"target": "tiny_trackers:Failing", "args": {"methods": "log"}}, "methods"),
    ],
)
def test_a_tracker_that_cannot_be_is_refused_before_the_start(tmp_path: Path, tracker: Any, what: str) -> None:
    with pytest.raises(ConfigurationError, match=r"reporting\.trackers\.0") as caught:
        train(tracked(tmp_path, tracker))
    assert what in str(caught.value)


class StandInWriter:
    """Has the methods of ``SummaryWriter`` that the recipe calls; notes the scalars of every writer."""

    scalars: list[tuple[str, float, int]] = []
    purged: list[int] = []

    def __init__(self, folder: str, *, purge_step: int) -> None:
        self.purged.append(purge_step)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))

    def add_text(self, name: str, text: str) -> None:
        assert json.loads(text)["world_size"] == 1

    def close(self) -> None:
        pass


def stand_in(folder: Path) -> dict[str, dict[int, float]]:
    return {
        split: {step: value for name, value, step in StandInWriter.scalars if name == f"{split}/loss"}
        for split in ("train", "validation")
    }


def event_files(folder: Path) -> dict[str, dict[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {
        split: {event.step: event.value for event in events.Scalars(f"{split}/loss")}
        for split in ("train", "validation")
    }


@pytest.mark.parametrize("read", [stand_in, event_files])
def test_the_recipe_of_a_tensorboard_tracker_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[[Path], dict[str, dict[int, float]]]
) -> None:
    """One file, ``tests/project/tensorboard_tracker.py``, and one row in the YAML; the run is resumed on the way."""
    if read is stand_in:
        monkeypatch.setattr(StandInWriter, "scalars", [])
        monkeypatch.setattr(StandInWriter, "purged", [])
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=StandInWriter))
    else:
        pytest.importorskip("tensorboard", reason="needs the package tensorboard")
    config = tracked(tmp_path, TENSORBOARD)
    for steps in (2, 4):
        assert train({**config, "limit": {"steps": steps}}).outcome == "finished"
    written, truth = read(tmp_path), recorded(tmp_path)
    assert messages(tmp_path) == []
    for split in truth:
        assert written[split] == pytest.approx(truth[split], rel=1e-6)
    assert sorted(written["train"]) == [1, 2, 3, 4]
    assert read is event_files or StandInWriter.purged == [1, 3]
