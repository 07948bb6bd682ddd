"""Whole runs over the data section's keys: any number of processes, interrupted and resumed, gives the same."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from runtime.build.builder import Builder
from runtime.build.components import check_components
from runtime.config.file import load
from runtime.data.hugging_face import adapted
from runtime.errors import ConfigurationError, LockstepError
from runtime.session import train
from tests.observed import configuration, largest_difference, observe
from tests.process_pool import ProcessPool
from tests.project.tiny import points

ORDERS: dict[str, dict[str, Any]] = {
    "lengths": {"group_by_length": {"lengths": {"target": "tiny:lengths"}, "stretch_batches": 2}},
    "budget": {"budget": {"tokens": 60, "lengths": {"target": "tiny:lengths"}}},
    "balanced": {"balance": 1},
    "weighted": {"weights": {"values": {"target": "tiny:lengths"}, "num_samples": 70}},
}


def samples_of(builder: Builder, name: str) -> Any:
    return builder.samples(name, batch_size=16)


def run_of(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    data = {"train": {"target": "tiny:points", "args": {"size": 60}}, "split": {"validation": 0.2, "stratify": 1}}
    model = {"target": "tiny:Mlp", "args": {"batch_norm": False}}  # which needs two samples in a slot
    base = {
        "model": model,
        "data": {**data, **ORDERS[name]},
        "limit": {"epochs": 2},
        "evaluation": {"every": "1 epoch"},
    }
    return configuration(folder, **{**base, **changes})


@pytest.mark.parametrize("name", ORDERS)
def test_an_order_trains_alike_on_other_numbers_of_processes_and_workers_also_interrupted(
    pool: ProcessPool, tmp_path: Path, name: str
) -> None:
    (alone,) = pool.run(observe, 1, run_of(tmp_path / "alone", name))
    pool.run(observe, 3, run_of(tmp_path / "cut", name, limit={"steps": 4}))
    resumed = pool.run(
        observe, 2, run_of(tmp_path / "cut", name), "data.loader.num_workers=1", "data.loader.start_method=fork"
    )
    assert alone["outcome"] == resumed[0]["outcome"] == "finished"
    assert alone["step"] == resumed[0]["step"] >= 6
    assert largest_difference(alone, resumed[0]) < 1e-10
    assert resumed[0]["results"] == pytest.approx(alone["results"], rel=1e-10)
    assert alone["results"]["samples"] == 12


@pytest.mark.single
def test_the_schedule_of_epochs_of_unequal_length_ends_with_the_run(tmp_path: Path) -> None:
    data = {"train": {"target": "tiny:points"}, "budget": {"tokens": 60, "lengths": {"target": "tiny:lengths"}}}
    result = observe(
        configuration(
            tmp_path,
            data=data,
            limit={"epochs": 3},
            model={"target": "tiny:Mlp", "args": {"batch_norm": False}},
            optimizer={"target": "SGD"},
            schedule={"target": "OneCycleLR", "args": {"max_lr": 0.1}},  # raises where it is stepped too often
        )
    )
    builder = Builder(load(configuration(tmp_path, data=data, limit={"epochs": 3})))
    order = builder.order(samples_of(builder, "train").source)
    assert result["step"] == sum(order.num_batches(epoch) for epoch in range(3))


def table(path: Path) -> Path:
    generator = np.random.default_rng(0)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["a", "b", "kind", "who", "y"])
        for i in range(80):
            a, b = generator.normal(50, 9, 2)
            writer.writerow([a, b, "uvw"[i % 3], f"person {i // 4}", int(a > 50)])
    return path


def table_run(folder: Path, **data: Any) -> dict[str, Any]:
    args = {"path": str(table(folder / "t.csv")), "target": "y", "task": "classification", "numeric": ["a", "b"]}
    args |= {"categorical": ["kind"], "keep": ["who"]}
    return configuration(
        folder / "run",
        model={"target": "MLP", "args": {"in_features": 5, "hidden": [8], "out_features": 2}},
        data={"train": {"target": "Table", "args": args}, **data},
        evaluation={"every": "1 epoch"},
        limit={"epochs": 1},
    )


def test_a_table_is_split_fitted_and_trained_alike_on_two_processes(pool: ProcessPool, tmp_path: Path) -> None:
    config = table_run(tmp_path, split={"validation": 0.2, "test": 12, "group": "who"})
    (alone,) = pool.run(observe, 1, {**config, "output": f"{tmp_path}/alone"})
    two = pool.run(observe, 2, config)
    assert largest_difference(alone, two[0]) < 1e-5
    assert alone["results"]["samples"] == 16  # of the validation part
    stored = json.loads((tmp_path / "run" / "preprocessing.json").read_text())
    builder = Builder(load(config))
    parts = {name: samples_of(builder, name).source for name in ("train", "validation", "test")}
    whole = parts["train"].source
    assert {name: len(part) for name, part in parts.items()} == {"train": 52, "validation": 16, "test": 12}
    assert all(part.source is whole for part in parts.values())  # one copy in memory
    people = [set(whole.column("who")[part.ids]) for part in parts.values()]
    assert len(set.union(*people)) == sum(map(len, people)) == 20
    for name in ("a", "b"):
        rows = whole.column(name)[parts["train"].ids]
        assert stored["numeric"][name] == pytest.approx({"fill": rows.mean(), "mean": rows.mean(), "std": rows.std()})


@pytest.mark.single
def test_a_validation_file_is_prepared_by_what_the_training_file_says(tmp_path: Path) -> None:
    config = table_run(tmp_path)
    (tmp_path / "v.csv").write_text("a,b,kind,who,y\n50,40,v,x,1\n60,45,new,x,0\n")
    args = {**config["data"]["train"]["args"], "path": str(tmp_path / "v.csv")}
    loaded = load({**config, "data": {**config["data"], "validation": {"target": "Table", "args": args}}})
    check_components(loaded)
    builder = Builder(loaded)
    found, training = samples_of(builder, "validation").source, samples_of(builder, "train").source
    a = training.column("a")
    batch = found.__getitems__([0, 1])
    assert batch["inputs"][:, 0].tolist() == pytest.approx(
        ((np.array([50, 60]) - a.mean()) / a.std()).tolist(), abs=1e-5
    )
    assert batch["inputs"][:, 2:].tolist() == [[0, 1, 0], [0, 0, 0]]


# Hugging Face's data sets


class Rows:
    """What Lockstep uses of a ``datasets.Dataset``."""

    _fingerprint = "abc"
    column_names = ("inputs", "target")

    def __init__(self, kind: str | None = None) -> None:
        self.format = {"type": kind}
        self.asked: list[list[int]] = []

    def with_format(self, kind: str) -> Rows:
        return Rows(kind)

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        self.asked.append(indices)
        return [{"inputs": torch.full((3,), float(i)), "target": torch.tensor(i)} for i in indices]


Rows.__module__ = "datasets.arrow_dataset"
Rows.__name__ = "Dataset"


@pytest.mark.single
def test_rows_of_hugging_face_are_fetched_a_microbatch_at_a_time_in_torchs_format() -> None:
    from runtime.data.samples import Samples, SlotIndex

    found = adapted(Rows(), "data.train")
    batch = Samples(found, seed=0)[SlotIndex(0, np.array([4, 2]))]
    assert batch["target"].tolist() == [4, 2]
    assert found.source.format == {"type": "torch"}
    assert found.source.asked == [[4, 2]]
    transformed = adapted(Rows("custom"), "data.train")
    Samples(transformed, seed=0)[SlotIndex(0, np.array([4, 2]))]
    assert transformed.source.asked == [[4], [2]]  # its transform may be random
    assert adapted(points(), "data.train").tensors[0].shape == (96, 8)


@pytest.mark.single
def test_a_saved_hugging_face_data_set_trains_by_target(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    inputs, target = points("train", 48).tensors
    rows = datasets.Dataset.from_dict(
        {"inputs": inputs.float().tolist(), "target": target.tolist(), "words": [[1] * (i % 5) for i in range(48)]}
    )
    rows.save_to_disk(str(tmp_path / "rows"))
    datasets.DatasetDict(train=rows).save_to_disk(str(tmp_path / "all"))
    args = {"dataset_path": str(tmp_path / "rows")}
    train = {"target": "datasets:load_from_disk", "args": args}
    data = {"train": train, "split": {"validation": 8, "stratify": "target"}, "group_by_length": "len:words"}
    columns = {"inputs": "inputs", "target": "target"}
    base = {"model": {"target": "tiny:Mlp", "args": {"dtype": "float32"}}, "limit": {"epochs": 1}}
    collate = {"target": "Padded", "args": {"parts": ["words"]}}
    config = configuration(tmp_path / "run", data={**data, "fields": columns, "collate": collate}, **base)
    result = observe(config, "evaluation.every=1 epoch")
    assert result["results"]["samples"] == 8
    loaded = load({**config, "data": {"train": {**train, "args": {"dataset_path": str(tmp_path / "all")}}}})
    with pytest.raises(LockstepError, match="splits train; choose one"):
        samples_of(Builder(loaded), "train")


# What is wrong


@pytest.mark.single
@pytest.mark.parametrize(
    ("data", "key", "words"),
    [
        ({"split": {"seed": 1}}, "data.split.validation", "give 'validation', 'test' or both"),
        ({"split": {"validation": 0.6, "test": 0.4}}, "data.split.validation", "nothing to train on"),
        ({"split": {"test": 0.1, "stratify": 1, "group": 1}}, "data.split.stratify", "'stratify' or 'group'"),
        ({"split": {"validation": 0.1}, "validation": "tiny:points"}, "data.validation", "one of the two"),
        ({"balance": 1, "weights": 1}, "data.balance", "not both"),
        ({"balance": 1, "shuffle": True}, "data.shuffle", "decides the order"),
        ({"budget": {"tokens": 9, "lengths": 1}, "drop_last": True}, "data.drop_last", "makes the batches"),
        ({"loader": {"worker_init": "tiny:points"}}, "data.loader.worker_init", "no workers"),
    ],
)
def test_contradicting_keys_are_refused(tmp_path: Path, data: dict[str, Any], key: str, words: str) -> None:
    with pytest.raises(ConfigurationError) as told:
        load(configuration(tmp_path, data={"train": {"target": "tiny:points"}, **data}))
    (problem,) = told.value.problems
    assert problem.key == key
    assert words in problem.what


@pytest.mark.single
@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"balance": "label"}, ["data.balance.classes", "'label' cannot be found"]),
        ({"balance": 2}, ["data.balance.classes", "no tensor 2", "2"]),
        ({"weights": "nowhere/w.npy"}, ["data.weights.values", "no file nowhere/w.npy"]),
        ({"weights": 0}, ["data.weights.values", "not shape (96, 8)"]),
        ({"weights": {"values": {"target": "tiny:zeros"}}}, ["data.weights.values", "all weights are 0"]),
        ({"group_by_length": {"lengths": {"target": "tiny:negative"}}}, ["data.group_by_length", "none negative"]),
        ({"budget": {"tokens": 3, "lengths": {"target": "tiny:lengths"}}}, ["alone has", "data.budget.tokens 3"]),
        (
            {"split": {"validation": 0.1, "group": {"target": "tiny:lenghts"}}},
            ["data.split.group.target", "did you mean 'lengths'"],
        ),
        ({"collate": "Paded"}, ["data.collate", "did you mean 'Padded'"]),
        ({"collate": {"target": "Padded", "args": {"vaule": 1}}}, ["data.collate.args.vaule", "did you mean 'value'"]),
    ],
)
def test_values_that_cannot_be_had_are_one_message(tmp_path: Path, data: dict[str, Any], words: list[str]) -> None:
    loaded = load(configuration(tmp_path, data={"train": {"target": "tiny:points"}, **data}))
    with pytest.raises(LockstepError) as told:
        check_components(loaded)
        builder = Builder(loaded)
        builder.order(samples_of(builder, "train").source)
    assert all(word in str(told.value) for word in words), str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.single
def test_values_from_a_file_are_those_of_the_rows_before_the_split(tmp_path: Path) -> None:
    np.save(tmp_path / "classes.npy", np.arange(96) % 4)
    data = {"train": {"target": "tiny:points"}, "split": {"validation": 0.25, "stratify": f"{tmp_path}/classes.npy"}}
    loaded = load(configuration(tmp_path, data={**data, "weights": f"{tmp_path}/classes.npy"}))
    builder = Builder(loaded)
    samples, inputs = samples_of(builder, "train"), points().tensors[0]
    drawn = builder.order(samples.source).batch(0, 0)
    rows = [int((inputs == row).all(1).nonzero()) for row in samples.source.tensors[0][drawn]]
    assert all(row % 4 for row in rows)  # those of weight 0 are never drawn


@pytest.mark.single
@pytest.mark.parametrize(
    ("module", "make", "line"),
    [
        ("PIL.Image", {"target": "ImageFolder", "args": {"folder": "."}}, "pip install 'lockstep-train[images]'"),
        ("pyarrow", {"target": "Table", "args": {"path": "t.parquet"}}, "pip install 'lockstep-train[parquet]'"),
    ],
)
def test_a_missing_package_gives_the_install_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, make: dict[str, Any], line: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(LockstepError) as told:
        samples_of(Builder(load(configuration(tmp_path, data={"train": make}))), "train")
    assert line in str(told.value)


@pytest.mark.single
def test_the_manuals_table_trains_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.documentation import ROOT, files

    generator = np.random.default_rng(0)
    with (tmp_path / "passengers.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["age", "fare", "class", "survived"])
        writer.writerows(
            [generator.integers(1, 80) if i % 9 else "", generator.normal(30), "ABC"[i % 3], i % 2] for i in range(60)
        )
    (tmp_path / "passengers.yaml").write_text(files(ROOT / "docs" / "guides" / "data.md")["passengers.yaml"])
    monkeypatch.chdir(tmp_path)
    result = train("passengers.yaml", "reporting.progress=false")
    assert (result.outcome, result.results["samples"]) == ("finished", 12)
    assert list(json.loads((result.folder / "preprocessing.json").read_text())["numeric"]) == ["age", "fare"]
