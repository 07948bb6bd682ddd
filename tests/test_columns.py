"""Columns hold what the configuration says, and the files give back the very numbers."""

from __future__ import annotations

import csv
import gc
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from runtime.config.sections import PredictionSection
from runtime.data.fields import Fields
from runtime.data.splitting import subset
from runtime.errors import ConfigurationError, DataError, EvaluationError, ObjectiveError, PredictionError, Problem
from runtime.inference import predictions_file
from runtime.inference.columns import ColumnBuilder, DataColumns, model_arguments
from runtime.inference.predictions_file import CsvFile, JsonLinesFile, ParquetFile, PredictionsFile
from runtime.losses.by_name import NextTokenLoss, torch_loss
from runtime.objective import Objective

LOGITS = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, 3.0]], dtype=torch.float64)


def built(objective: Objective, output: Any, columns: dict[str, str], **section: Any) -> dict[str, list[Any]]:
    builder = ColumnBuilder(
        PredictionSection.model_construct(labels=section.pop("labels", []), top_k=section.pop("top_k", None)),
        columns,
        lambda key, what: Problem("config.yaml:1", ".".join(key), what),
        section.pop("names", ()),
    )
    index = np.arange(10, 10 + len(output))
    found = builder.build(objective.predicted(output), section.pop("ids", index), index)
    return {name: values.tolist() if isinstance(values, np.ndarray) else values for name, values in found.items()}


def wrong(*arguments: Any, **options: Any) -> str:
    with pytest.raises(ConfigurationError) as caught:
        built(*arguments, **options)
    return str(caught.value)


CLASSES = torch_loss(nn.CrossEntropyLoss, {})
BINARY = torch_loss(nn.BCEWithLogitsLoss, {})
VALUES = torch_loss(nn.MSELoss, {})


def test_classes_their_labels_and_probabilities() -> None:
    labels = ["no", "maybe", "yes"]
    columns = {"i": "index", "n": "id", "is": "prediction", "c": "class", "p": "probability", "{}": "probabilities"}
    found = built(CLASSES, LOGITS, columns, labels=labels, ids=["x", "y"])
    probabilities = LOGITS.softmax(-1)
    assert found["i"] == [10, 11]
    assert found["n"] == ["x", "y"]
    assert found["is"] == ["no", "maybe"]  # of two that are equally probable the first
    assert found["c"] == [0, 1]
    assert found["p"] == probabilities.amax(-1).tolist()
    assert [found[label] for label in labels] == probabilities.T.tolist()
    assert list(found) == ["i", "n", "is", "c", "p", *labels]
    assert list(built(CLASSES, LOGITS, {"p": "probabilities"})) == ["p_0", "p_1", "p_2"]
    assert list(built(CLASSES, LOGITS, {})) == ["id", "prediction", "probability"]


def test_the_best_classes_come_first() -> None:
    found = built(CLASSES, LOGITS, {"best": "top_classes", "p{}": "top_probabilities"}, top_k=2, labels=["a", "b", "c"])
    probabilities = LOGITS.softmax(-1)
    assert found == {
        "best_1": ["a", "b"],
        "best_2": ["c", "c"],
        "p1": [probabilities[0, 0], probabilities[1, 1]],
        "p2": [probabilities[0, 2], probabilities[1, 2]],
    }


@pytest.mark.parametrize("shape", [(3,), (3, 1)])
def test_one_logit_a_sample_is_a_yes_or_a_no(shape: tuple[int, ...]) -> None:
    logits = torch.tensor([-1.0, 0.0, 2.0]).view(shape)
    found = built(BINARY, logits, {"p": "probability", "is": "prediction", "c": "class"}, labels=["no", "yes"])
    assert found["p"] == logits.flatten().sigmoid().tolist()
    assert (found["is"], found["c"]) == (["no", "no", "yes"], [0, 0, 1])  # one half is a no, as in torchmetrics


def test_several_yes_or_no_have_a_column_each() -> None:
    logits = torch.tensor([[-1.0, 2.0], [3.0, -4.0]])
    found = built(BINARY, logits, {"{}": "prediction", "p": "probability"}, labels=["red", "round"])
    assert (found["red"], found["round"]) == ([0, 1], [1, 0])
    assert found["p_round"] == logits.sigmoid()[:, 1].tolist()


def test_values_are_written_as_they_are() -> None:
    vector = torch.tensor([[1.5, -2.0], [0.25, 4.0]])
    assert built(VALUES, vector, {"y": "prediction"}) == {"y_0": [1.5, 0.25], "y_1": [-2.0, 4.0]}
    assert built(VALUES, vector[:, :1], {}) == {"id": [10, 11], "prediction": [1.5, 0.25]}
    assert built(VALUES, vector[:, 0].bfloat16(), {"y": "output"}) == {"y": [1.5, 0.25]}


def test_negative_log_likelihoods_and_tokens() -> None:
    log_probabilities = LOGITS.log_softmax(-1)
    found = built(torch_loss(nn.NLLLoss, {}), log_probabilities, {"p": "probability"})
    assert found["p"] == pytest.approx(LOGITS.softmax(-1).amax(-1).tolist(), rel=1e-12)
    tokens = built(NextTokenLoss(), LOGITS[:, None].repeat(1, 4, 1), {"token": "prediction"})
    assert tokens == {f"token_{i}": [0, 1] for i in range(4)}
    of_images = built(CLASSES, LOGITS[:, :, None].repeat(1, 1, 4), {"at": "class"})  # (batch, classes, positions)
    assert of_images == {f"at_{i}": [0, 1] for i in range(4)}


class Own(Objective):
    def predicted(self, output: Any) -> dict[str, Tensor]:
        return {"norm": output.norm(dim=-1), "class": output.argmin(-1)}


def test_several_numbers_are_called_as_the_data_calls_its_targets() -> None:
    assert list(built(VALUES, LOGITS, {"{}": "prediction"}, names=["price", "rent", "size"])) == [
        "price",
        "rent",
        "size",
    ]
    assert list(built(VALUES, LOGITS, {"{}": "prediction"}, names=["price", "rent"])) == ["0", "1", "2"]
    several = torch_loss(nn.BCEWithLogitsLoss, {})
    assert list(built(several, LOGITS, {"p_{}": "probability"}, names=["a", "b", "c"])) == ["p_a", "p_b", "p_c"]
    assert built(CLASSES, LOGITS, {"is": "prediction"}, names=["²", "1", "2"])["is"] == ["²", "1"]


def test_an_objective_of_ones_own_adds_what_it_likes() -> None:
    found = built(Own(), LOGITS, {"n": "norm", "is": "prediction"}, labels=["a", "b", "c"])
    assert found == {"n": LOGITS.norm(dim=-1).tolist(), "is": ["b", "a"]}


def test_mistakes_are_told_with_their_key() -> None:
    assert "prediction.columns.x: holds 'clas'" in wrong(CLASSES, LOGITS, {"x": "clas"})
    assert "did you mean 'class'?" in wrong(CLASSES, LOGITS, {"x": "clas"})
    assert "known here: id, index, prediction, output" in wrong(VALUES, LOGITS, {"x": "zzzzzz"})
    assert "which the objective does not give" in wrong(VALUES, LOGITS, {"x": "class"})
    assert "prediction.labels: 2 labels for 3 classes" in wrong(CLASSES, LOGITS, {}, labels=["a", "b"])
    assert "no classes to name" in wrong(VALUES, LOGITS, {}, labels=["a", "b"])
    assert "makes a second column 'p_0'" in wrong(CLASSES, LOGITS, {"p_0": "class", "p": "probabilities"})
    assert "has the shape (2, 3) for each" in wrong(VALUES, torch.zeros(2, 2, 3), {"y": "output"})
    with pytest.raises(
        EvaluationError, match=r"shape \(2, 3\) for 3 samples; each sample needs one row.*data\.collate"
    ):
        ColumnBuilder(PredictionSection(), {}, lambda key, what: Problem("", "", what)).build(
            CLASSES.predicted(LOGITS), np.arange(3), np.arange(3)
        )
    with pytest.raises(EvaluationError, match=r"is a dict, not a tensor.*model\.output"):
        built(Objective(), {"a": 1, "b": 2}, {})


def test_what_the_model_is_called_with() -> None:
    x, target = torch.zeros(2, 3), torch.ones(2)
    for batch in (x, (x,), [x], (x, target), {"inputs": x}, {"inputs": x, "target": target}):
        assert model_arguments(Fields(), batch) == ((x,), {})
    assert model_arguments(Fields(inputs=["a", "b"]), {"a": 1, "b": 2}) == ((), {"a": 1, "b": 2})
    with pytest.raises(ObjectiveError, match=r"data\.fields"):
        model_arguments(Fields(), {"a": 1, "b": 2})


def test_ids_are_one_text_or_number_for_each_sample() -> None:
    index, parts = np.arange(2), DataColumns(object())
    assert parts.ids((torch.zeros(2, 1),), index, None) is index
    assert list(parts.ids((0, torch.tensor([7, 8])), index, 1)) == [7, 8]
    assert parts.ids({"n": [np.str_("a"), "b"]}, index, "n") == ["a", "b"]
    with pytest.raises(DataError, match=r"data\.fields\.id: 'n' has 1 values for 2 samples; data\.collate"):
        parts.ids({"n": ["a"]}, index, "n")
    for ids in ([["a"], ["b"]], torch.zeros(2, 2), "ab", [None, "a"]):
        with pytest.raises(
            DataError, match=r"data\.fields\.id: 'n' must be one string or number for each of 2 samples"
        ):
            parts.ids({"n": ids}, index, "n")


class WithColumns:
    def __len__(self) -> int:
        return 3

    def column(self, name: str) -> Any:
        return {"n": np.array(["a", "b", "c"]), "row": np.array([5, 6, 7]), "short": np.zeros(2)}[name]


class InAFile(WithColumns):
    def as_written(self, name: str) -> Any:
        return np.array(["05", "06", "07"])


@pytest.mark.parametrize("batch", [torch.zeros(2, 1), (torch.zeros(2, 1),), {"x": torch.zeros(2, 1)}])
def test_ids_that_the_batch_lacks_are_a_column_of_the_data_set(batch: Any) -> None:
    index = np.array([1, 2])
    assert DataColumns(WithColumns()).ids(batch, index, "n") == ["b", "c"]
    assert list(DataColumns(subset(WithColumns(), np.array([2, 0, 1]))).ids(batch, index, "row")) == [5, 6]
    assert DataColumns(InAFile()).of(batch, index, "row") == ["06", "07"]
    for name, words in (
        ("none", r"column\('none'\) raised KeyError"),
        ("short", r"column\('short'\) has the shape \(2,\) for 3 samples"),
    ):
        assert not DataColumns(WithColumns()).has_column(name)
        with pytest.raises(DataError, match=rf"data\.fields\.id: WithColumns\.{words}"):
            DataColumns(WithColumns()).ids(batch, index, name)
    with pytest.raises(DataError, match=r"data\.fields\.id: the data has no part 'n': .*no column\(name\) method"):
        DataColumns(object()).ids(batch, index, "n")


def numbers(dtype: Any) -> Any:
    bits = np.random.default_rng(0).integers(0, 2**63, 2000, dtype=np.int64).astype(np.uint64)
    values = bits.view(np.float64) if dtype is np.float64 else bits.astype(np.uint32).view(np.float32)
    special = np.array([0.0, -0.0, 0.1, 1e-45, 1e30, np.nan, np.inf, -np.inf, 16777217], dtype=dtype)
    return np.concatenate([special, values]).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_number_is_read_back_as_it_was(tmp_path: Path, dtype: Any) -> None:
    values = numbers(dtype)
    texts = ['quote "', "comma, ", "line\nbreak", "é", ""] * (len(values) // 5) + ["x"] * (len(values) % 5)
    columns = {"number": values, "text": texts}
    for kind, name in ((CsvFile, "csv"), (JsonLinesFile, "jsonl"), (ParquetFile, "parquet")):
        with (tmp_path / f"x.{name}").open("wb") as file:
            made = kind(file)
            made.append(kind.encode(columns))
            made.append(kind.encode(columns))
            made.finish()
    rows = list(csv.reader(io.StringIO((tmp_path / "x.csv").read_text(), newline="")))
    assert rows[0] == ["number", "text"]
    assert [text for _, text in rows[1:]] == texts * 2
    read = np.array([number for number, _ in rows[1:]], dtype=np.float64).astype(dtype)
    assert np.array_equal(read, np.tile(values, 2), equal_nan=True)
    assert max(len(number) for number, _ in rows[1:]) <= (15 if dtype is np.float32 else 24)

    objects = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text(encoding="utf-8").splitlines()]
    finite = np.isfinite(values)
    assert [o["number"] is None for o in objects[: len(values)]] == (~finite).tolist()
    read = np.array([o["number"] for o in objects[: len(values)] if o["number"] is not None], dtype=dtype)
    assert read.tobytes() == values[finite].tobytes()

    pq = pytest.importorskip("pyarrow.parquet", reason="needs the extra parquet")
    table = pq.read_table(tmp_path / "x.parquet")
    assert table["number"].to_numpy().dtype == dtype
    assert table["number"].to_numpy().tobytes() == np.tile(values, 2).tobytes()
    assert table["text"].to_pylist() == texts * 2


@pytest.mark.parametrize("kind", [CsvFile, JsonLinesFile, ParquetFile])
def test_outputs_that_change_in_size_are_refused(tmp_path: Path, kind: Any) -> None:
    with (tmp_path / "x").open("wb") as file:
        made = kind(file)
        made.append(kind.encode({"y_0": np.zeros(2)}))
        with pytest.raises(PredictionError, match="gives the columns y_0, y_1, the first one gave y_0"):
            made.append(kind.encode({"y_0": np.zeros(2), "y_1": np.zeros(2)}))
        made.finish()


@pytest.mark.parametrize("kind", [CsvFile, JsonLinesFile, ParquetFile])
@pytest.mark.parametrize("commit", [True, False])
def test_what_is_not_committed_leaves_no_trace(
    tmp_path: Path, kind: Any, commit: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictions_file, "_ROWS_PER_GROUP", 1)
    file = PredictionsFile(tmp_path / "x", kind, force=False)
    file.open()
    file.append(kind.encode({"y": np.zeros(2)}))
    assert not (tmp_path / "x").exists()
    if commit:
        file.commit()
    file.close()
    del file
    gc.collect()  # what is forgotten unclosed would complain here
    assert [path.name for path in tmp_path.iterdir()] == (["x"] if commit else [])


def test_a_file_that_came_meanwhile_is_kept(tmp_path: Path) -> None:
    file = PredictionsFile(tmp_path / "x", CsvFile, force=False)
    file.open()
    file.append(CsvFile.encode({"y": np.zeros(2)}))
    (tmp_path / "x").write_text("mine")
    with pytest.raises(PredictionError, match="already exists"):
        file.commit()
    file.close()
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("x", "mine")]
