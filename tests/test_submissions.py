"""Whole jobs, from files to a submission: ids, names, preparation and units are the training data's, by nobody's saying so."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from runtime.errors import DataError, LockstepError
from runtime.session import predict, train
from tests.observed import configuration
from tests.process_pool import ProcessPool

single = pytest.mark.single


def write(path: Path, header: str, rows: list[Any]) -> str:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header.split(","), *rows])
    return str(path)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def job(folder: Path, **changes: Any) -> dict[str, Any]:
    settings = {"batch": {"global_size": 8, "slots": 2}, "limit": {"steps": 3}, "evaluation": {}, "checks": "off"}
    return configuration(folder / "run", **settings, **changes)


def outputs(run: Any, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return run.model.eval()(inputs)


# Ids


@pytest.mark.parametrize(
    ("ids", "kind"),
    [
        (["007", "010", "011"], "texts"),
        (["12345678901234567890", "2", "3"], "texts"),
        (["+1", "2", "-0"], "texts"),
        (["1_0", "2", "3"], "texts"),
        (["9007199254740993", "2", "-3"], "numbers"),
        (["0", "2", "3"], "numbers"),
    ],
)
@single
@pytest.mark.parametrize("where", ["keep", "numeric", "nowhere"])
def test_an_id_is_written_as_it_stands_in_the_file(tmp_path: Path, ids: list[str], kind: str, where: str) -> None:
    train_file = write(tmp_path / "train.csv", "x,y", [(i, "ab"[i % 2]) for i in range(16)])
    numeric = ["x", "id"] if where == "numeric" and kind == "numbers" else ["x"]
    if len(numeric) == 2:
        train_file = write(tmp_path / "train.csv", "x,y,id", [(i, "ab"[i % 2], i) for i in range(16)])
    args = {"path": train_file, "target": "y", "task": "classification", "numeric": numeric}
    test = write(tmp_path / "test.csv", "id,x", list(zip(ids, "123", strict=True)))
    own = {"path": test} | ({"keep": ["id"]} if where == "keep" else {})
    config = job(
        tmp_path,
        model={"target": "MLP", "args": {"in_features": len(numeric), "hidden": [4], "out_features": 2}},
        data={"train": {"target": "Table", "args": args}},
        prediction={
            "data": {"target": "Table", "args": own},
            "sample_submission": write(tmp_path / "sample.csv", "y,id", [("a", called) for called in reversed(ids)]),
            "columns": {"id": "id", "y": "prediction"},
        },
    )
    train(config)
    predict(config, output=tmp_path / "out.csv")
    assert [row["id"] for row in read(tmp_path / "out.csv")] == ids[::-1]
    predict(config, "prediction.sample_submission=null", "data.fields.id=id", output=tmp_path / "named.csv")
    assert [row["id"] for row in read(tmp_path / "named.csv")] == ids


# Images


def image_job(folder: Path) -> tuple[dict[str, Any], Tensor]:
    image = pytest.importorskip("PIL.Image")
    draw = np.random.default_rng(0)
    for name in ("train/ant", "train/bee", "train/cow", "test"):
        (folder / name).mkdir(parents=True)
        for number in range(7):
            pixels = draw.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            image.fromarray(pixels).save(folder / name / f"{number:03d}.png")
    prepared = {"mean": [0.4, 0.5, 0.6], "std": [0.1, 0.2, 0.3]}
    config = job(
        folder,
        model="tiny_prediction:flat",
        data={"train": {"target": "ImageFolder", "args": {"folder": str(folder / "train"), **prepared}}},
        prediction={"data": {"target": "ImageFolder", "args": {"folder": str(folder / "test")}}},
    )
    read_images = [np.asarray(image.open(path)) for path in sorted((folder / "test").iterdir())]
    read = torch.from_numpy(np.stack(read_images)).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(prepared[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    return config, (read - mean) / std


@single
@pytest.mark.parametrize(("column", "called"), [("file", "{:03d}.png"), ("stem", "{:03d}")])
def test_images_to_predict_lie_in_a_plain_folder_and_are_prepared_as_the_training_images(
    tmp_path: Path, column: str, called: str
) -> None:
    config, inputs = image_job(tmp_path)
    run = train(config)
    names = [called.format(i) for i in range(7)]
    sample = write(tmp_path / "sample.csv", f"{column},label", [(name, "ant") for name in names])
    predict(config, f"prediction.sample_submission={sample}", output=tmp_path / "out.csv")
    found = read(tmp_path / "out.csv")
    expected = [["ant", "bee", "cow"][i] for i in outputs(run, inputs).argmax(-1)]
    assert [(row[column], row["label"]) for row in found] == list(zip(names, expected, strict=True))
    predict(config, "prediction.columns={'{}': output}", output=tmp_path / "raw.csv")
    raw = [[float(row[name]) for name in ("ant", "bee", "cow")] for row in read(tmp_path / "raw.csv")]
    assert raw == [pytest.approx(row, abs=1e-5) for row in outputs(run, inputs).tolist()]


@single
def test_a_plain_folder_of_images_is_no_training_data(tmp_path: Path) -> None:
    config, _ = image_job(tmp_path)
    config["data"]["train"]["args"]["folder"] = str(tmp_path / "test")
    with pytest.raises(LockstepError, match=r"name in data\.fields\.target the part"):
        train(config)


# Texts


def text_job(folder: Path) -> dict[str, Any]:
    rows = [(f"t{i}", "ab"[i % 2] * (i % 5 + 1), ["ham", "spam"][i % 2]) for i in range(24)]
    train_file = write(folder / "train.csv", "key,text,label", rows)
    test = write(folder / "test.csv", "key,text,note", [(f"u{i}", "b" * (i + 1), f"n {i}") for i in range(9)])
    reader = {"path": train_file, "text": "text", "target": "label", "tokenizer": "bytes"}
    return job(
        folder,
        model="tiny_prediction:Bag",
        data={
            "train": {"target": "LabelledTexts", "args": reader},
            "collate": {"target": "Padded", "args": {"parts": {"inputs": 0}}},
        },
        prediction={
            "data": {"target": "LabelledTexts", "args": {"path": test}},
            "sample_submission": write(
                folder / "sample.csv", "key,label", [(f"u{i}", "ham") for i in range(8, -1, -1)]
            ),
        },
    )


def predicted_texts(config: dict[str, Any], folder: Path) -> None:
    predict(config, output=folder / "out.csv")
    columns = "prediction.columns={key: id, note: 'column:note', text: 'column:text', label: prediction}"
    predict(config, "prediction.sample_submission=null", "data.fields.id=key", columns, output=folder / "more.csv")


def test_texts_have_the_ids_of_their_file_and_any_of_its_columns_from_any_number_of_processes(
    pool: ProcessPool, tmp_path: Path
) -> None:
    config = text_job(tmp_path)
    run = train(config)
    for processes in (1, 2):
        (tmp_path / str(processes)).mkdir()
        pool.run(predicted_texts, processes, config, tmp_path / str(processes))
    scores = [outputs(run, torch.full((1, i + 1), ord("b")))[0] for i in range(9)]
    labels = [["ham", "spam"][int(score.argmax())] for score in scores]
    found = read(tmp_path / "1" / "out.csv")
    assert [(row["key"], row["label"]) for row in found] == [(f"u{i}", labels[i]) for i in range(8, -1, -1)]
    more = read(tmp_path / "1" / "more.csv")
    assert more == [{"key": f"u{i}", "note": f"n {i}", "text": "b" * (i + 1), "label": labels[i]} for i in range(9)]
    for name in ("out.csv", "more.csv"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


# Numbers


@single
@pytest.mark.parametrize("targets", [["price", "rent"], ["price"]])
def test_standardised_targets_are_predicted_in_the_units_of_the_file(tmp_path: Path, targets: list[str]) -> None:
    draw = np.random.default_rng(0)
    x = draw.normal(size=(40, 2))
    rows = [(f"{a:.9}", f"{b:.9}", f"{1e5 + 300 * a:.9}", f"{2 - b:.9}") for a, b in x]
    args = {"path": write(tmp_path / "train.csv", "a,b,price,rent", rows), "target": targets, "task": "regression"}
    test = write(tmp_path / "test.csv", "id,a,b", [(i, a, b) for i, (a, b, *_) in enumerate(rows[:6])])
    config = job(
        tmp_path,
        model={"target": "MLP", "args": {"in_features": 2, "hidden": [], "out_features": len(targets)}},
        data={"train": {"target": "Table", "args": {**args, "numeric": ["a", "b"], "standardize_target": True}}},
        objective="MSELoss",
        prediction={
            "data": {"target": "Table", "args": {"path": test}},
            "columns": {"{}": "prediction", "raw": "output"},
        },
    )
    run = train(config)
    predict(config, output=tmp_path / "out.csv")
    table = np.array(rows, dtype=float)
    inputs = (table[:, :2] - table[:, :2].mean(0)) / table[:, :2].std(0)
    raw = outputs(run, torch.tensor(inputs[:6], dtype=torch.float32)).numpy().astype(float)
    in_file = table[:, 2 : 2 + len(targets)]
    expected = raw * in_file.std(0) + in_file.mean(0)
    found = read(tmp_path / "out.csv")
    several = len(targets) > 1
    for place, name in enumerate(targets):
        written = [float(row[name if several else "{}"]) for row in found]
        assert written == pytest.approx(expected[:, place].tolist(), rel=1e-6)
        assert [float(row[f"raw_{name}" if several else "raw"]) for row in found] == pytest.approx(
            raw[:, place].tolist(), abs=1e-5
        )


@single
def test_probabilities_of_several_labels_are_called_as_the_targets_columns(tmp_path: Path) -> None:
    rows = [(i, i % 2, i % 3 == 0) for i in range(24)]
    labels = [(i, int(a), int(b)) for i, a, b in rows]
    args = {"path": write(tmp_path / "train.csv", "x,toxic,rude", labels), "task": "regression"}
    sample = write(tmp_path / "sample.csv", "id,rude,toxic", [(i, 0.5, 0.5) for i in range(4)])
    config = job(
        tmp_path,
        model={"target": "MLP", "args": {"in_features": 1, "hidden": [], "out_features": 2}},
        data={"train": {"target": "Table", "args": {**args, "target": ["toxic", "rude"]}}},
        objective="BCEWithLogitsLoss",
        prediction={
            "data": {
                "target": "Table",
                "args": {"path": write(tmp_path / "test.csv", "id,x", [(i, i) for i in range(4)])},
            },
            "sample_submission": sample,
            "columns": {"id": "id", "{}": "probability"},
        },
    )
    run = train(config)
    predict(config, output=tmp_path / "out.csv")
    inputs = (torch.arange(4.0)[:, None] - 11.5) / np.arange(24).std()
    expected = outputs(run, inputs).sigmoid()
    found = read(tmp_path / "out.csv")
    assert [float(row["toxic"]) for row in found] == pytest.approx(expected[:, 0].tolist(), rel=1e-5)
    assert [float(row["rude"]) for row in found] == pytest.approx(expected[:, 1].tolist(), rel=1e-5)


# Labels


@single
def test_classes_of_equal_or_no_numbers_have_one_order_in_every_process(tmp_path: Path) -> None:
    from runtime.data_sources.tables import _sorted_labels

    assert _sorted_labels({"1", "1.0", "10", "2", "1e0"}) == ["1", "1.0", "1e0", "2", "10"]
    assert _sorted_labels({"nan", "3", "20", "inf"}) == ["20", "3", "inf", "nan"]


@single
def test_evaluation_data_with_targets_in_another_order_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "t.csv", "x,a,b", [(i, i, -i) for i in range(16)])
    table = {"target": "Table", "args": {"path": file, "task": "regression", "target": ["a", "b"]}}
    other = {"target": "Table", "args": {**table["args"], "target": ["b", "a"]}}  # type: ignore[dict-item]
    config = job(
        tmp_path,
        model={"target": "MLP", "args": {"in_features": 1, "hidden": [], "out_features": 2}},
        data={"train": table, "validation": other},
        objective="MSELoss",
    )
    with pytest.raises(DataError, match=r"data.validation: .* is 'b', but 'a' in data.train"):
        train(config)
