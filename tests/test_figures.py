"""Tables per class and pictures of evaluations in the run folder and on the terminal."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn import metrics as sk
from torchmetrics.classification import MultilabelConfusionMatrix

from runtime.evaluation.class_results import ClassResults
from runtime.reporting.console import ConsoleTracker
from runtime.reporting.figures import FiguresTracker, confusion_figure, curves_figure, label_confusions_figure
from runtime.reporting.tracker import TrackedRun, Tracker
from tests.observed import configuration, observe
from tests.process_pool import ProcessPool
from tests.project.tiny import Mlp, points

CLASSES = {"task": "multiclass", "num_classes": 3}
RESULTS: dict[str, Any] = {
    "loss": 0.5,
    "recall": [0.75, 0.5],
    "confusion": [[3, 1], [2, 2]],
    "roc": [[0.0, 0.5, 1.0], [0.0, 0.75, 1.0], [1.0, 0.6, 0.1]],
}
FOUND = ClassResults({"recall": "per_class", "confusion": "confusion", "roc": "roc"}, ["cat", "[dog]"])


def tracker(folder: Path, told: list[str], step: int = 0, **changes: Any) -> FiguresTracker:
    given = {"pictures": True, "resumed_step": step, "warn": told.append, "others": Tracker(), **changes}
    return FiguresTracker(folder, FOUND, **given)


def steps(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "figures").iterdir())


def test_a_run_leaves_tables_and_pictures_of_its_evaluations(pool: ProcessPool, tmp_path: Path) -> None:
    config = configuration(
        tmp_path,
        data={
            "train": {"target": "tiny:points", "args": {"size": 64}},
            "validation": {"target": "tiny:points", "args": {"split": "validation", "size": 150}},
        },
        evaluation={
            "every": "1 step",
            "metrics": {
                "precision": {"target": "Precision", "args": {**CLASSES, "average": "none"}},
                "confusion": {"target": "ConfusionMatrix", "args": CLASSES},
                "curve/of recall": {"target": "PrecisionRecallCurve", "args": CLASSES},
            },
            "class_names": ["ant", "bee", "wasp"],
        },
        limit={"steps": 3},
    )
    rank = pool.run(observe, 2, config)[0]
    assert steps(tmp_path) == ["step-00000003"]  # the last checkpoint's, and the newest
    folder = tmp_path / "figures" / "step-00000003"
    for name in ("confusion", "curve_of_recall"):
        with Image.open(folder / f"validation-{name}.png") as picture:
            assert min(picture.size) > 300
            assert np.asarray(picture.convert("L")).std() > 5  # something is drawn
    model = Mlp().eval()
    model.load_state_dict({name: torch.from_numpy(value) for name, value in rank["weights"].items()})
    inputs, target = points("validation", 150).tensors
    with torch.no_grad():
        predicted = model(inputs).argmax(-1).numpy()
    with (folder / "validation-classes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == ["ant", "bee", "wasp"]
    assert [int(row["targets"]) for row in rows] == np.bincount(target.numpy()).tolist()
    truth = sk.precision_score(target.numpy(), predicted, average=None)
    assert [float(row["precision"]) for row in rows] == pytest.approx(truth)


def test_figures_are_kept_for_the_newest_evaluation_and_for_kept_checkpoints(tmp_path: Path) -> None:
    told: list[str] = []
    figures = tracker(tmp_path, told, pictures=False)
    (tmp_path / "checkpoints" / "step-00000002-epoch-1-loss-0.5").mkdir(parents=True)
    for step in (1, 2, 3, 4):
        figures.log(RESULTS, step=step, epoch=1, split="validation")
    assert steps(tmp_path) == ["step-00000002", "step-00000004"]
    tracker(tmp_path, told, step=3)
    assert steps(tmp_path) == ["step-00000002"]  # a resumed run takes the later steps again
    assert not told


def test_a_missing_matplotlib_is_said_once_and_tables_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    told: list[str] = []
    figures = tracker(tmp_path, told)
    for step in (1, 2):
        figures.log(RESULTS, step=step, epoch=1, split="validation")
    assert len(told) == 1
    assert "pip install 'lockstep-train[plots]'" in told[0]
    assert (tmp_path / "figures" / "step-00000002" / "validation-classes.csv").exists()


def test_a_folder_that_cannot_be_written_is_said_and_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / "figures").write_text("a file")
    told: list[str] = []
    figures = tracker(tmp_path, told)
    figures.log(RESULTS, step=1, epoch=1, split="validation")
    figures.log(RESULTS, step=2, epoch=1, split="validation")
    assert len(told) >= 1
    assert "figures could not be written" in told[0]


def test_the_terminal_shows_the_last_evaluation_per_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    console = ConsoleTracker(progress=False, classes=FOUND)
    console.log({**RESULTS, "recall": [0.125, 0.125]}, step=1, epoch=1, split="validation")
    console.log(RESULTS, step=2, epoch=1, split="validation")
    console.finish("finished")
    shown = capsys.readouterr().out
    table = [line.replace("│", " ").split() for line in shown[shown.index("validation, per class") :].splitlines()]
    assert ["cat", "4", "0.7500"] in table
    assert ["[dog]", "4", "0.5000"] in table
    assert "0.1250" not in shown


def test_the_matrix_shows_counts_and_shares_of_the_true_class() -> None:
    axes = confusion_figure([[3, 1], [0, 0]], ["a", "b"], "test").axes[0]
    shares = axes.images[0].get_array()
    assert shares is not None
    assert np.array_equal(shares, np.array([[0.75, 0.25], [0, 0]]))
    assert [(text.get_position(), text.get_text()) for text in axes.texts] == [((0, 0), "3"), ((1, 0), "1")]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]


def test_curves_have_their_points_and_the_names_of_their_classes() -> None:
    results = {"pr": [[[0.5, 1.0], [0.25, 1.0]], [[1.0, 0.0], [0.5, 0.0]], [[0.1], [0.2]]]}  # precision comes first
    ((_, kind, lines),) = ClassResults({"pr": "precision_recall"}, ["a", "b"]).curves(results)
    axes = curves_figure(kind, lines, "test").axes[0]
    assert [list(np.asarray(line.get_xdata())) for line in axes.lines] == [[1.0, 0.0], [0.5, 0.0]]
    assert [list(np.asarray(line.get_ydata())) for line in axes.lines] == [[0.5, 1.0], [0.25, 1.0]]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("recall", "precision")
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b"]


def test_wandb_gets_the_pictures_and_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from runtime.config.reporting import WeightsAndBiasesSection
    from runtime.reporting.wandb_tracker import WandbTracker

    logged: list[dict[str, Any]] = []
    run = SimpleNamespace(
        log=logged.append,
        define_metric=lambda *_, **__: None,
        finish=lambda **_: None,
        settings=SimpleNamespace(sync_dir=tmp_path),
    )
    fake = SimpleNamespace(
        init=lambda **_: run, Settings=dict, Image=lambda path: ("image", path), Table=lambda **given: ("table", given)
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    told: list[str] = []
    wandb = WandbTracker(WeightsAndBiasesSection(mode="offline"), warn=told.append, classes=FOUND)
    wandb.start(TrackedRun(name="run", id="id", folder=tmp_path, configuration={}, step=0))
    figures = tracker(tmp_path, told, others=wandb)
    figures.log(RESULTS, step=7, epoch=1, split="validation")
    wandb.log(RESULTS, step=7, epoch=1, split="validation")
    assert not told
    numbers = [row for row in logged if "epoch" in row]
    assert numbers == [{"epoch": 1, "validation/loss": 0.5, "step": 7}]
    assert {row["step"] for row in logged} == {7}
    pictures = {name: value for row in logged for name, value in row.items()}
    folder = tmp_path / "figures" / "step-00000007"
    assert pictures["validation/confusion"] == ("image", str(folder / "validation-confusion.png"))
    assert pictures["validation/roc"] == ("image", str(folder / "validation-roc.png"))
    rows = [["cat", 4, 0.75], ["[dog]", 4, 0.5]]
    assert pictures["validation/classes"] == ("table", {"columns": ["class", "targets", "recall"], "data": rows})


def test_each_label_has_a_matrix_and_of_many_the_first_are_drawn() -> None:
    torch.manual_seed(0)
    predictions, target = torch.rand(50, 3), torch.randint(0, 2, (50, 3))
    metric = MultilabelConfusionMatrix(3)
    metric.update(predictions, target)
    found = ClassResults.of({"each": metric}, ["cat", "dog", "owl"]).label_confusions(
        {"each": metric.compute().tolist()}
    )
    expected = sk.multilabel_confusion_matrix(target, predictions.round().int())
    assert found == [("each", expected.tolist())]
    figure = label_confusions_figure(found[0][1], ["cat", "dog", "owl"], "test")
    assert [axes.get_title() for axes in figure.axes] == ["cat", "dog", "owl"]
    assert [text.get_text() for text in figure.axes[1].texts] == [str(n) for n in expected[1].flatten()]
    many = label_confusions_figure([[[1, 0], [0, 1]]] * 50, [str(i) for i in range(50)], "test")
    assert len(many.axes) == 36 and "the first 36 of 50 labels" in many.get_suptitle()
