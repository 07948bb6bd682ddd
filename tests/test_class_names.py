"""Names of classes and the way data is prepared flow from the training data to tables, pictures and predictions."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Dataset, TensorDataset
from torch.utils.data import Subset as TorchSubset

from runtime.data.class_names import class_names
from runtime.data.hugging_face import ArrowRows
from runtime.data.splitting import subset
from runtime.errors import ConfigurationError, DataError, LockstepError, PredictionError
from runtime.session import evaluate, predict, train
from tests.observed import configuration
from tests.project.tiny import points

pytestmark = pytest.mark.single


class Named(Dataset[Any]):
    def __init__(self, classes: Any, **more: Any) -> None:
        self.classes = classes
        self.__dict__.update(more)

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        return index


def hugging_face(**features: Any) -> ArrowRows:
    source = SimpleNamespace(format={"type": "torch"}, _fingerprint="f", features=features)
    return ArrowRows(source)


LABEL = SimpleNamespace(names=["no", "yes"])
ABC = ["a", "b", "c"]


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        (Named(ABC), None, ABC),
        (Named(("a", "b", "c")), None, ABC),
        (Named([3, 10]), None, ["3", "10"]),
        (Named([("tench", "Tinca tinca"), ("shark",)]), None, ["tench, Tinca tinca", "shark"]),
        (TorchSubset(Named(ABC), [1, 2]), None, ABC),
        (TorchSubset(TorchSubset(Named(ABC), [1, 2]), [0]), None, ABC),
        (subset(Named(ABC), torch.arange(2).numpy()), None, ABC),
        (ConcatDataset([Named(ABC), Named(ABC)]), None, ABC),
        (ConcatDataset([Named(ABC), Named(["x"])]), None, None),
        (Named(ABC, target_transform=lambda target: 2 - target), None, None),
        (Named(["a", "a"]), None, None),
        (Named([]), None, None),
        (Named(10), None, None),
        (Named(np.array(["a", "b", "c"])), None, ABC),
        (Named(np.array([3, 10])), None, ["3", "10"]),
        (Named({0: "a", 1: "b", 2: "c"}), None, ABC),
        (Named({"b": 1, "c": 2, "a": 0}), None, ABC),
        (Named({"b": 1, "a": 2}), None, None),
        (Named(None, class_to_idx={"b": 1, "a": 0}), None, ["a", "b"]),
        (TensorDataset(torch.zeros(2)), None, None),
        (hugging_face(label=LABEL, text=object()), "label", ["no", "yes"]),
        (hugging_face(target=LABEL), None, ["no", "yes"]),
        (hugging_face(tags=SimpleNamespace(feature=LABEL)), "tags", ["no", "yes"]),
        (hugging_face(tags=[LABEL]), "tags", ["no", "yes"]),
        (hugging_face(label=LABEL), "text", None),
        (hugging_face(label=LABEL), ("label", "text"), None),
    ],
)
def test_a_data_set_tells_what_its_classes_are_called(source: Any, target: Any, expected: list[str] | None) -> None:
    assert class_names(source, target) == expected


def test_class_labels_of_hugging_face_are_told() -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"x": datasets.Value("float32"), "label": datasets.ClassLabel(names=["no", "yes"])})
    assert class_names(hugging_face(**features), "label") == ["no", "yes"]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def patients(first: int, count: int, names: tuple[str, str], *, known: bool) -> list[dict[str, Any]]:
    draw = random.Random(first)
    rows = []
    for number in range(first, first + count):
        ill = number % 2 == 0
        row = {
            "patient": f"p{number}",
            "size": round(draw.gauss(3 if ill else -3, 1), 3),
            "site": "arm" if ill else "leg",
        }
        rows.append(row | {"note": f"n{number}"} | ({"diagnosis": names[not ill]} if known else {}))
    return rows


def project(
    folder: Path, task: str, names: tuple[str, str] = ("malignant", "benign"), **changes: Any
) -> dict[str, Any]:
    """A table of patients: those with even numbers are ill. The rows to predict lack a size."""
    write(folder / "train.csv", patients(0, 80, names, known=True))
    rows = patients(100, 20, names, known=False)
    rows[3]["size"] = ""
    write(folder / "test.csv", rows)
    binary = task == "binary"
    args = {"path": str(folder / "train.csv"), "target": "diagnosis", "task": task, "missing": "mean"}
    kind = {"task": "binary"} if binary else {"task": "multiclass", "num_classes": 2}
    return configuration(
        folder / "run",
        model={"target": "MLP", "args": {"in_features": 3, "hidden": [8], "out_features": 1 if binary else 2}},
        data={
            "train": {
                "target": "Table",
                "args": {**args, "numeric": ["size"], "categorical": ["site"], "keep": ["patient"]},
            },
            "split": {"validation": 0.25, "stratify": "diagnosis"},
            "fields": {"inputs": "inputs", "id": "patient"},
        },
        objective="BCEWithLogitsLoss" if binary else "CrossEntropyLoss",
        optimizer={"target": "AdamW", "args": {"lr": 0.05}},
        limit={"epochs": 6},
        evaluation={
            "every": "1 epoch",
            "metrics": {
                "confusion": {"target": "ConfusionMatrix", "args": kind},
                "f1": {"target": "F1Score", "args": {"task": "multiclass", "num_classes": 2, "average": "none"}},
            }
            if not binary
            else {"confusion": {"target": "ConfusionMatrix", "args": kind}},
        },
        prediction={"data": {"target": "Table", "args": {"path": str(folder / "test.csv")}}, **changes},
    )


@pytest.mark.parametrize("task", ["binary", "classification"])
def test_predictions_of_a_table_are_named_and_prepared_as_the_training_file_was_which_may_be_gone(
    tmp_path: Path, task: str
) -> None:
    config = project(
        tmp_path, task, columns={"who": "id", "is": "prediction", "note": "column:note", "at": "column:site"}
    )
    train(config)
    (tmp_path / "train.csv").unlink()
    predict(config, output=tmp_path / "out.csv")
    found = read(tmp_path / "out.csv")
    wanted = patients(100, 20, ("malignant", "benign"), known=True)
    assert [row["who"] for row in found] == [row["patient"] for row in wanted]
    assert [row["note"] for row in found] == [row["note"] for row in wanted]
    assert [row["at"] for row in found] == [row["site"] for row in wanted]
    right = [a["is"] == b["diagnosis"] for a, b in zip(found, wanted, strict=True)]
    assert sum(right) >= 19, found
    if task == "classification":
        (table,) = (tmp_path / "run" / "figures").glob("step-*/validation-classes.csv")
        assert [row["class"] for row in read(table)] == ["benign", "malignant"]


def test_names_in_the_configuration_win(tmp_path: Path) -> None:
    config = project(tmp_path, "classification")
    config["evaluation"]["class_names"] = ["good", "bad"]
    train(config)
    (table,) = (tmp_path / "run" / "figures").glob("step-*/validation-classes.csv")
    assert [row["class"] for row in read(table)] == ["good", "bad"]
    predict(config, output=tmp_path / "a.csv")
    assert {row["prediction"] for row in read(tmp_path / "a.csv")} == {"good", "bad"}
    predict(config, "prediction.labels=[g, b]", output=tmp_path / "b.csv")
    assert {row["prediction"] for row in read(tmp_path / "b.csv")} == {"g", "b"}
    evaluate(config, output=tmp_path / "e.json")
    assert json.loads((tmp_path / "e.json").read_text())["class_names"] == ["good", "bad"]


def test_classes_that_are_numbers_are_written_as_these_numbers(tmp_path: Path) -> None:
    config = project(tmp_path, "classification", ("7", "3"))
    train(config)
    predict(config, output=tmp_path / "out.jsonl")
    found = [json.loads(line)["prediction"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert set(found) == {3, 7}


def images(folder: Path, classes: dict[str, int]) -> dict[str, Any]:
    image = pytest.importorskip("PIL.Image")
    for name, grey in classes.items():
        (folder / name).mkdir(parents=True)
        for number in range(6):
            image.new("L", (4, 4), grey + number).save(folder / name / f"{number}.png")
    return {"target": "ImageFolder", "args": {"folder": str(folder), "channels": 1}}


def test_folders_that_lack_a_class_are_numbered_as_in_training(tmp_path: Path) -> None:
    data = {
        "train": images(tmp_path / "train", {"ant": 10, "bee": 120, "cow": 240}),
        "validation": images(tmp_path / "validation", {"ant": 12, "cow": 238}),
    }
    model = {"target": "tiny_images:Flat", "args": {}}
    (tmp_path / "tiny_images.py").write_text(
        "from torch import nn\n\n"
        "def Flat():\n    return nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))\n"
    )
    kind = {"task": "multiclass", "num_classes": 3}
    metrics = {"accuracy": {"target": "Accuracy", "args": {**kind, "average": "micro"}}}
    metrics["each"] = {"target": "Recall", "args": {**kind, "average": "none"}}
    config = configuration(
        tmp_path / "run",
        code=str(tmp_path),
        model=model,
        data=data,
        batch={"global_size": 6},
        optimizer={"target": "AdamW", "args": {"lr": 0.02}},
        limit={"epochs": 40},
        evaluation={"every": "40 epochs", "metrics": metrics},
        prediction={"data": images(tmp_path / "unknown", {"all": 120})},
    )
    assert train(config).results["accuracy"] == 1.0
    (table,) = (tmp_path / "run" / "figures").glob("step-*/validation-classes.csv")
    assert [row["class"] for row in read(table)] == ["ant", "bee", "cow"]
    predict(config, output=tmp_path / "out.csv")
    assert {row["prediction"] for row in read(tmp_path / "out.csv")} == {"bee"}
    strange = images(tmp_path / "strange", {"ant": 10, "dog": 120})
    with pytest.raises(DataError, match=r"class folder 'dog', which is not in the training data"):
        train({**config, "output": str(tmp_path / "no"), "data": {**data, "validation": strange}})


def named_points(classes: list[str]) -> Any:
    found: Any = points("train", 12)
    found.classes = classes
    return found


def test_evaluation_data_that_numbers_its_classes_otherwise_is_refused(tmp_path: Path) -> None:
    names = {"target": "tests.test_class_names:named_points", "args": {"classes": ["a", "b", "c"]}}
    other = {**names, "args": {"classes": ["a", "c", "b"]}}
    with pytest.raises(DataError, match=r"data.validation: class 1 is 'c', but 'b' in data.train"):
        train(configuration(tmp_path / "run", data={"train": names, "validation": other}))


def sample(folder: Path, value: str) -> str:
    write(folder / "sample.csv", [{"patient": f"p{number}", "diagnosis": value} for number in range(119, 99, -1)])
    return f"prediction.sample_submission={folder / 'sample.csv'}"


def test_a_sample_submission_gets_names_and_never_numbers_in_place_of_texts(tmp_path: Path) -> None:
    config = project(tmp_path, "binary")
    train(config)
    predict(config, sample(tmp_path, "benign"), output=tmp_path / "out.csv")
    assert {row["diagnosis"] for row in read(tmp_path / "out.csv")} == {"malignant", "benign"}
    numbers = "prediction.columns={patient: id, diagnosis: class}"
    with pytest.raises(PredictionError, match=r"'diagnosis' of .* holds text, such as 'benign', .* numbers"):
        predict(config, sample(tmp_path, "benign"), numbers, output=tmp_path / "no.csv")
    with pytest.raises(PredictionError, match=r"holds numbers, such as 0, .* text, such as '(benign|malignant)'"):
        predict(config, sample(tmp_path, "0"), output=tmp_path / "no.csv")
    assert not (tmp_path / "no.csv").exists()
    predict(config, sample(tmp_path, "0"), "prediction.labels=[0, 1]", output=tmp_path / "codes.csv")
    assert {row["diagnosis"] for row in read(tmp_path / "codes.csv")} == {"0", "1"}
    predict(config, sample(tmp_path, "0"), numbers, output=tmp_path / "classes.csv")


def test_a_part_that_the_data_lacks_is_told(tmp_path: Path) -> None:
    config = project(tmp_path, "binary")
    train(config)
    with pytest.raises(LockstepError, match=r"no column 'nonsense'"):
        predict(config, "prediction.columns={id: id, x: 'column:nonsense'}", output=tmp_path / "out.csv")
    own = {"data": {"target": "tiny:points", "args": {"split": "validation"}}, "columns": {"x": "column:nonsense"}}
    assert isinstance(own, dict)
    with pytest.raises(ConfigurationError, match=r"prediction.columns.x: .* no part 'nonsense'"):
        predict(
            {**config, "model": "tiny:Mlp", "output": str(_trained(tmp_path / "tiny")), "prediction": own,
             "data": {"train": {"target": "tiny:points"}}, "objective": "CrossEntropyLoss", "evaluation": {}},
            output=tmp_path / "out.csv",
        )  # fmt: skip


def _trained(folder: Path) -> Path:
    train(configuration(folder, limit={"steps": 1}))
    return folder
