"""Predictions are those of a hand-written loop, in order, each id once, the same bytes from any number of processes."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn import metrics as sk

from runtime import launched
from runtime.errors import (
    CheckpointError,
    ConfigurationError,
    DataError,
    LockstepError,
    MissingDependencyError,
    PredictionError,
)
from runtime.inference import predictions_file
from runtime.inference.predictions_file import CsvFile
from runtime.session import evaluate, predict, train
from tests.observed import configuration
from tests.process_pool import ProcessPool
from tests.project.tiny import Mlp, points
from tests.project.tiny_prediction import name_of
from tests.test_launch import clean_environment

SIZE = 103
CLASSES = {"task": "multiclass", "num_classes": 3}
COLUMNS = {"id": "id", "is": "prediction", "sure": "probability", "p": "probabilities", "raw_{}": "output"}
single = pytest.mark.single


def config_of(folder: Path) -> dict[str, Any]:
    validation = {"target": "tiny:points", "args": {"split": "validation", "size": SIZE}}
    return configuration(
        folder,
        data={"train": {"target": "tiny:points"}, "validation": validation},
        batch={"global_size": 16, "slots": 2},
        averaging={"decay": 0.7, "evaluate": False},
        evaluation={
            "every": "2 steps",
            "micro_size": 10,
            "metrics": {
                "accuracy": {"target": "Accuracy", "args": {**CLASSES, "average": "micro"}},
                "auroc": {"target": "AUROC", "args": CLASSES},
            },
        },
        checkpoint={"every": "2 steps", "keep": 5, "best": [{"metric": "loss", "mode": "max"}]},
        limit={"steps": 6},
        checks="off",  # they refuse a best checkpoint of the highest loss
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; the worst of its three checkpoints counts as the best, so that it is not the newest."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    train(config_of(folder))
    return folder


def by_hand(run: Path, step: int = 6, size: int = SIZE, averaged: bool = False) -> torch.Tensor:
    """Logits of the validation data, by torch alone."""
    (checkpoint,) = (run / "checkpoints").glob(f"step-{step:08d}*")
    model = Mlp().eval()
    model.load_state_dict(load_file(checkpoint / "model.safetensors"))
    if averaged:
        prefix = "averaging/average/model."
        found = load_file(checkpoint / "training.safetensors")
        average = {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}
        assert average
        model.load_state_dict(average, strict=False)
    with torch.no_grad():
        return model(points("validation", size).tensors[0])


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def predicted_all(run: Path, folder: Path, split: str, overrides: list[str]) -> str:
    for suffix in ("csv", "jsonl", "parquet"):
        done = predict(run, *overrides, split=split, output=folder / f"out.{suffix}")
    return str(done.output)


def written_columns(columns: dict[str, str]) -> str:
    return f"prediction.columns={json.dumps(columns)}"


def predicted_with_nan(run: Path, output: Path) -> tuple[int, str]:
    with redirect_stderr(StringIO()) as said:
        done = predict(run, "model=tiny_guarded:NanOfLargeInputs", split="validation", output=output)
    return done.samples, said.getvalue()


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_model_that_gives_nan_is_told(pool: ProcessPool, run: Path, tmp_path: Path, world_size: int) -> None:
    expected = int((points("validation", SIZE).tensors[0][:, 0] > 1.0).sum())
    assert 0 < expected < SIZE
    (samples, said), *others = pool.run(predicted_with_nan, world_size, run, tmp_path / "p.csv")
    assert samples == SIZE
    assert f"NaN for {expected} of {SIZE} samples" in said
    assert not [told for _, told in others if "NaN" in told]


def test_files_are_the_same_bytes_from_1_2_and_3_processes_and_equal_a_hand_written_loop(
    pool: ProcessPool, run: Path, tmp_path: Path
) -> None:
    overrides = [written_columns(COLUMNS), "prediction.labels=[low, middle, high]"]
    for world_size in (1, 2, 3):
        folder = tmp_path / str(world_size)
        folder.mkdir()
        pool.run(predicted_all, world_size, run, folder, "validation", overrides)
        assert sorted(path.name for path in folder.iterdir()) == ["out.csv", "out.jsonl", "out.parquet"]
        for name in ("out.csv", "out.jsonl", "out.parquet"):
            assert (folder / name).read_bytes() == (tmp_path / "1" / name).read_bytes(), (world_size, name)

    logits = by_hand(run)
    labels = ["low", "middle", "high"]
    probabilities = logits.softmax(-1)
    names = ["id", "is", "sure", "p_low", "p_middle", "p_high", "raw_low", "raw_middle", "raw_high"]
    from_csv = rows_of(tmp_path / "1" / "out.csv")
    from_json = [json.loads(line) for line in (tmp_path / "1" / "out.jsonl").read_text().splitlines()]
    pq = pytest.importorskip("pyarrow.parquet", reason="needs the extra parquet")
    from_parquet = pq.read_table(tmp_path / "1" / "out.parquet").to_pylist()
    for rows, number in ((from_csv, float), (from_json, float), (from_parquet, float)):
        assert list(rows[0]) == names
        assert [int(row["id"]) for row in rows] == list(range(SIZE))
        assert [row["is"] for row in rows] == [labels[i] for i in logits.argmax(-1)]
        for row, p, raw in zip(rows, probabilities.tolist(), logits.tolist(), strict=True):
            assert number(row["sure"]) == pytest.approx(max(p), rel=1e-12)
            assert [number(row[f"p_{label}"]) for label in labels] == pytest.approx(p, rel=1e-12)
            assert [number(row[f"raw_{label}"]) for label in labels] == pytest.approx(raw, rel=1e-12)


@pytest.mark.parametrize("size", [1, 2])
def test_fewer_samples_than_ranks_are_predicted(pool: ProcessPool, run: Path, tmp_path: Path, size: int) -> None:
    overrides = [f"data.validation.args.size={size}", "evaluation.micro_size=1"]
    pool.run(one_prediction, 3, run, tmp_path / "out.csv", *overrides)
    rows = rows_of(tmp_path / "out.csv")
    assert [row["id"] for row in rows] == [str(i) for i in range(size)]
    assert [int(row["prediction"]) for row in rows] == by_hand(run, size=size).argmax(-1).tolist()


def test_lockstep_predict_and_accelerate_launch_write_the_same_file(run: Path, tmp_path: Path) -> None:
    """Two real processes by ``lockstep predict``, from another folder and from nothing but the run folder."""
    out, again = tmp_path / "out.csv", tmp_path / "again.csv"
    line = [sys.executable, "-m", "runtime.cli", "predict", str(run), "--split", "validation", "--output", str(out)]
    done = subprocess.run(
        [*line, "--processes", "2", "evaluation.micro_size=7"],
        env=clean_environment(), capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "accelerate.commands.launch" in done.stderr
    assert "runtime/predict.py" in done.stderr
    assert f"103 samples of data.validation: {out}" in done.stdout
    predict(run, "evaluation.micro_size=7", split="validation", output=again)
    assert out.read_bytes() == again.read_bytes()


def evaluated(source: Any, *overrides: str, **options: Any) -> dict[str, Any]:
    return dict(evaluate(source, *overrides, **options).results)


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=single), 2, 3])
def test_evaluate_reports_what_training_reported(pool: ProcessPool, run: Path, world_size: int, tmp_path: Path) -> None:
    reported = [
        record
        for record in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        if record["event"] == "evaluation"
    ]
    for record in (reported[0], reported[-1]):
        (checkpoint,) = (run / "checkpoints").glob(f"step-{record['step']:08d}*")
        ranks = pool.run(evaluated, world_size, run, checkpoint=str(checkpoint))
        for results in ranks:
            assert results == ranks[0]
            for name in ("samples", "loss", "accuracy", "auroc"):
                exact = results[name] == record[name]
                assert exact if world_size == 1 else results[name] == pytest.approx(record[name], rel=1e-12), name


@single
def test_scikit_learn_finds_in_the_file_what_evaluate_reports(run: Path, tmp_path: Path) -> None:
    for which in ("raw", "averaged"):
        out, report = tmp_path / f"{which}.csv", tmp_path / f"{which}.json"
        predict(run, written_columns({"p": "probabilities"}), split="validation", output=out, weights=which)
        done = evaluate(run, weights=which, output=report)
        written = json.loads(report.read_text())
        assert (written["weights"], written["split"], written["step"]) == (which, "validation", 6)
        assert written["results"] == done.results
        probabilities = np.loadtxt(out, delimiter=",", skiprows=1)
        truth = points("validation", SIZE).tensors[1].numpy()
        assert done.results["accuracy"] == pytest.approx(sk.accuracy_score(truth, probabilities.argmax(-1)), rel=1e-9)
        assert done.results["loss"] == pytest.approx(sk.log_loss(truth, probabilities), rel=1e-9)
        auroc = sk.roc_auc_score(truth, probabilities, multi_class="ovr")
        assert done.results["auroc"] == pytest.approx(auroc, rel=1e-6)
        expected = by_hand(run, averaged=which == "averaged").softmax(-1).numpy()
        assert probabilities == pytest.approx(expected, rel=1e-12)


@single
def test_weights_are_by_default_those_that_the_run_evaluates(run: Path, tmp_path: Path) -> None:
    raw, averaged = evaluate(run), evaluate(run, "averaging.evaluate=true")
    assert (raw.weights, averaged.weights) == ("raw", "averaged")
    assert raw.results["loss"] != averaged.results["loss"]
    assert averaged.results == evaluate(run, weights="averaged").results
    assert raw.results == evaluate(run, "averaging.evaluate=true", weights="raw").results
    with pytest.raises(ConfigurationError, match="no averaging"):
        evaluate(run, "averaging=null", weights="averaged")


@single
def test_the_checkpoint_is_the_newest_the_best_or_the_one_that_is_named(run: Path, tmp_path: Path) -> None:
    losses = {int(p.name[5:13]): json.loads((p / "state.json").read_text())["results"]["loss"]
              for p in (run / "checkpoints").glob("step-*")}  # fmt: skip
    worst = max(losses, key=lambda step: losses[step])
    assert worst != 6
    assert evaluate(run).step == 6
    best = evaluate(run, checkpoint="best:loss")
    assert (best.step, best.results["loss"]) == (worst, losses[worst])
    assert evaluate(config_of(run), checkpoint="step-00000004").step == 4
    assert evaluate(config_of(run), checkpoint=str(best.checkpoint)).results == best.results
    for choice, words in {
        "best:accuracy": "kept by 'accuracy'.*checkpoint.best: loss",
        "step-9": "there is no checkpoint step-9",
        str(run): "is not a checkpoint",
    }.items():
        with pytest.raises(LockstepError, match=words):
            evaluate(run, checkpoint=choice)


@single
def test_a_damaged_checkpoint_is_never_evaluated(run: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    newest = copy / "checkpoints" / "step-00000006" / "model.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors does not match its checksum"):
        evaluate(copy, checkpoint="step-00000006")
    assert evaluate(copy).step == 4  # as a start of the run would go on
    assert newest.exists()


@single
def test_evaluation_and_prediction_change_nothing_in_the_run_folder(run: Path, tmp_path: Path) -> None:
    def contents() -> dict[str, bytes]:
        return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}

    before = contents()
    evaluate(run, output=tmp_path / "results.json")
    predict(run, split="validation", output=tmp_path / "out.csv")
    assert contents() == before


def test_random_numbers_are_those_of_the_evaluation_in_any_world(pool: ProcessPool, tmp_path: Path) -> None:
    config = {**config_of(tmp_path / "run"), "model": "tiny_prediction:Drawing"}
    train(config)
    files = []
    for world_size in (1, 2):
        files.append(tmp_path / f"{world_size}.csv")
        pool.run(one_prediction, world_size, config, files[-1], written_columns({"p": "probabilities"}))
    assert files[0].read_bytes() == files[1].read_bytes()
    probabilities = np.loadtxt(files[0], delimiter=",", skiprows=1)
    truth = points("validation", SIZE).tensors[1].numpy()
    assert evaluate(config).results["loss"] == pytest.approx(sk.log_loss(truth, probabilities), rel=1e-9)


def one_prediction(source: Any, output: Path, *overrides: str, split: str = "validation") -> str:
    return predict(source, *overrides, split=split, output=output).outcome


# Data without a target


@pytest.mark.parametrize(
    ("data", "fields"),
    [
        ("tiny_prediction:alone", "{}"),
        ("tiny_prediction:Inputs", "{}"),
        ("tiny_prediction:Inputs", "{inputs: 0, target: 1}"),
        ("{target: tiny_prediction:Inputs, args: {named: true}}", "{inputs: {inputs: x}, id: name}"),
    ],
    ids=["tuples of one", "bare tensors", "bare tensors, and the fields of the training data", "with names"],
)
@single
def test_data_without_a_target_is_predicted(run: Path, tmp_path: Path, data: str, fields: str) -> None:
    predict(run, f"prediction.data={data}", f"data.fields={fields}", output=tmp_path / "out.csv")
    rows = rows_of(tmp_path / "out.csv")
    assert [int(row["prediction"]) for row in rows] == by_hand(run).argmax(-1).tolist()
    named = [name_of(i) for i in range(SIZE)] if "name" in fields else [str(i) for i in range(SIZE)]
    assert [row["id"] for row in rows] == named


@single
def test_fields_that_a_batch_does_not_have_are_named(run: Path, tmp_path: Path) -> None:
    data = "prediction.data=tiny_prediction:Inputs"
    for fields, words in {
        "{inputs: x}": r"data\.fields\.inputs names 'x'",
        "{id: name}": r"data\.fields\.id: the data has no part 'name': the batch is \(\d+, 8\) float64",
    }.items():
        with pytest.raises(LockstepError, match=words):
            predict(run, data, f"data.fields={fields}", output=tmp_path / "out.csv")
    with pytest.raises(ConfigurationError, match=r"there is no prediction\.data or data\.test"):
        predict(run, output=tmp_path / "out.csv")
    assert not list(tmp_path.iterdir())


@single
@pytest.mark.parametrize("fields", ["{}", "{inputs: x, id: name}"])
@pytest.mark.parametrize(
    ("collate", "words"),
    [
        ("dropping", r"a batch of 10 samples to predict has 6 rows: data\.collate"),
        ("two_views", r"a batch of 10 samples to predict has 20 rows"),
        ("by_size", r"in another order than the samples .* data\.fields\.id"),
        ("plain", ""),
    ],
)
def test_rows_that_are_not_the_samples_in_their_order_are_not_written_as_theirs(
    run: Path, tmp_path: Path, collate: str, words: str, fields: str
) -> None:
    named = "name" in fields
    data = f"{{target: tiny_prediction:Inputs, args: {{named: {str(named).lower()}}}}}"
    asked = [f"prediction.data={data}", f"data.fields={fields}", f"data.collate=tiny_untrusted:{collate}"]
    if words and not (named and collate == "by_size"):
        with pytest.raises(DataError, match=words):
            predict(run, *asked, output=tmp_path / "out.csv")
        assert not list(tmp_path.iterdir())
        return
    predict(run, *asked, output=tmp_path / "out.csv")
    expected = by_hand(run).argmax(-1).tolist()
    found = {row["id"]: int(row["prediction"]) for row in rows_of(tmp_path / "out.csv")}
    assert found == {name_of(i) if named else str(i): expected[i] for i in range(SIZE)}


# The file


@single
def test_a_file_that_is_there_is_kept_unless_force_is_given(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    out.write_text("mine")
    with pytest.raises(PredictionError, match=r"already exists.*--force"):
        predict(run, split="validation", output=out)
    assert out.read_text() == "mine"
    predict(run, split="validation", output=out, force=True)
    assert len(rows_of(out)) == SIZE
    for name, words in {"out.txt": "must end in", "none/out.csv": "there is no folder"}.items():
        with pytest.raises(LockstepError, match=words):
            predict(run, split="validation", output=tmp_path / name)


@single
def test_parquet_without_pyarrow_says_how_to_install_it(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictions_file, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'lockstep-train\[parquet\]'"):
        predict(run, split="validation", output=tmp_path / "out.parquet")


@single
def test_a_killed_prediction_leaves_nothing_visible_and_the_next_one_works(run: Path, tmp_path: Path) -> None:
    def killed() -> None:
        data = f"{{target: tiny_prediction:Inputs, args: {{at: 60, number: {int(signal.SIGKILL)}}}}}"
        predict(run, f"prediction.data={data}", output=tmp_path / "out.csv")

    process = multiprocessing.get_context("fork").Process(target=killed)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.csv.partial-")
    predict(run, "prediction.data=tiny_prediction:Inputs", output=tmp_path / "out.csv")
    assert [path.name for path in tmp_path.iterdir()] == ["out.csv"]
    assert len(rows_of(tmp_path / "out.csv")) == SIZE


def infer(act: str, *arguments: str) -> int:
    return launched.run(act, list(arguments))


@pytest.mark.parametrize(("world_size", "at", "rank"), [pytest.param(1, 40, 0, marks=single), (2, 20, 1)])
def test_a_signal_ends_it_on_all_ranks_with_75_and_no_file(
    pool: ProcessPool, run: Path, tmp_path: Path, world_size: int, at: int, rank: int
) -> None:
    """With two processes the second one alone gets it, with its first microbatch; ranks agree every 64 rounds at least."""
    data = f"prediction.data={{target: tiny_prediction:Inputs, args: {{size: 4000, at: {at}, rank: {rank}}}}}"
    out = tmp_path / "out.csv"
    codes = pool.run(infer, world_size, "predict", str(run), f"--output={out}", data, "evaluation.micro_size=20")
    assert codes == [75] * world_size
    assert not list(tmp_path.iterdir())


def full_disk(run: Path, out: Path) -> str:
    def append(self: Any, payload: bytes) -> None:
        raise OSError(28, "No space left on device")

    before, CsvFile.append = CsvFile.append, append  # type: ignore[method-assign]
    try:
        predict(run, split="validation", output=out)
    except PredictionError as error:
        return str(error)
    finally:
        CsvFile.append = before  # type: ignore[method-assign]
    return "written"


def test_a_full_disk_is_told_to_every_rank_and_leaves_nothing(pool: ProcessPool, run: Path, tmp_path: Path) -> None:
    told = pool.run(full_disk, 2, run, tmp_path / "out.csv")
    assert told[0] == told[1]
    assert (
        told[0] == f"{tmp_path / 'out.csv'} could not be written: No space left on device; no incomplete file is left"
    )
    assert not list(tmp_path.iterdir())


@single
def test_nothing_more_is_predicted_once_it_cannot_be_written(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[bytes] = []

    def encode(columns: Any) -> bytes:
        encoded.append(b"[]\n")
        return encoded[-1]

    def append(self: Any, payload: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(CsvFile, "encode", staticmethod(encode))
    monkeypatch.setattr(CsvFile, "append", append)
    with pytest.raises(PredictionError, match="No space left"):
        predict(run, split="validation", output=tmp_path / "out.csv")
    assert len(encoded) == 1


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_memory_does_not_grow_with_the_number_of_rows(
    run: Path, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictions_file, "_ROWS_PER_GROUP", 200)

    def peak(size: int) -> int:
        data = f"prediction.data={{target: tiny_prediction:Cheap, args: {{size: {size}}}}}"
        out = tmp_path / f"{size}.{suffix}"
        tracemalloc.start()
        try:
            predict(run, data, "evaluation.micro_size=100", output=out)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(200)  # what is imported for the first time
    few, many = peak(400), peak(6_000)
    assert many < few + 100_000  # of 300 kB that the rows of a file of text take


# Sample submissions


@pytest.fixture
def sample(tmp_path: Path) -> Iterator[Any]:
    def written(ids: list[Any], header: str = "name,kind") -> str:
        path = tmp_path / "sample.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            width = header.count(",")
            place = header.split(",").index("name")
            filled = [[i if at == place else "?" for at in range(width + 1)] for i in ids]
            csv.writer(file).writerows([header.split(","), *filled])
        return f"prediction.sample_submission={path}"

    yield written


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "sample.csv")


def test_a_sample_submission_is_filled_in_its_own_order(
    pool: ProcessPool, run: Path, tmp_path: Path, sample: Any
) -> None:
    order = list(range(SIZE))
    random.Random(0).shuffle(order)
    named = "prediction.data={target: tiny_prediction:Inputs, args: {named: true}}"
    overrides = [named, "data.fields={inputs: {inputs: x}, id: name}", sample([name_of(i) for i in order])]
    for world_size in (1, 3):
        pool.run(one_submission, world_size, run, tmp_path / f"{world_size}.csv", overrides)
    rows = rows_of(tmp_path / "1.csv")
    classes = by_hand(run).argmax(-1).tolist()
    assert [(row["name"], int(row["kind"])) for row in rows] == [(name_of(i), classes[i]) for i in order]
    assert (tmp_path / "1.csv").read_bytes() == (tmp_path / "3.csv").read_bytes()

    columns = written_columns({"sure": "probability", "name": "id", "kind": "class"})
    wider = sample([name_of(i) for i in order], "kind,name,sure")
    predict(run, *overrides[:2], wider, columns, output=tmp_path / "wide.csv")
    header, first = (tmp_path / "wide.csv").read_text().splitlines()[:2]
    assert header == "kind,name,sure"
    assert first.split(",")[0] == rows[0]["kind"]


def one_submission(run: Path, output: Path, overrides: list[str]) -> None:
    predict(run, *overrides, output=output)


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([*range(SIZE), 500, 501], r"has 105 ids and the data 103 samples: at least 2 ids .*'500', '501'"),
        (list(range(SIZE - 2)), r"'101', '102' are extra"),
        ([*range(1, SIZE), "0x"], r"'0' are extra; its first is '1'"),
        ([*range(SIZE), 5, 7], r"duplicate ids: '5', '7'"),
        ([], "has no rows"),
    ],
    ids=["too many", "too few", "others", "twice", "none"],
)
@single
def test_ids_that_do_not_match_are_told_and_nothing_is_written(
    run: Path, tmp_path: Path, sample: Any, ids: list[Any], words: str
) -> None:
    data = "prediction.data=tiny_prediction:Inputs"
    with pytest.raises(PredictionError, match=words):
        predict(run, data, sample(ids), output=tmp_path / "out.csv")
    assert names(tmp_path) == []


@single
def test_ids_that_are_missing_among_named_samples_or_predicted_twice_are_told(
    run: Path, tmp_path: Path, sample: Any
) -> None:
    from runtime.inference.sample_submission import SubmissionFile

    path = Path(sample(["c", "a", "b", "d"]).partition("=")[2])

    def append(*ids: str) -> Any:
        with (tmp_path / "x").open("wb") as file:
            submission = SubmissionFile(file, path, "name", num_samples=9, ids_are_index=False)
            submission.append(SubmissionFile.encode({"name": list(ids), "kind": np.arange(len(ids))}))
            submission.finish()

    with pytest.raises(PredictionError, match=r"2 ids of .* are missing from the predictions: 'b', 'd'"):
        append("c", "a")
    with pytest.raises(PredictionError, match=r"duplicate ids: 'a'"):
        append("a", "b", "a")
    append("d", "c", "b", "a")
    assert (tmp_path / "x").read_text() == "name,kind\nc,1\na,3\nb,2\nd,0\n"


@single
def test_columns_of_a_sample_that_are_not_predicted_are_told(run: Path, tmp_path: Path, sample: Any) -> None:
    data = "prediction.data=tiny_prediction:Inputs"
    for header, columns, words in (
        ("name,kind,sure", None, "set what each column of"),
        ("name,kind", {"name": "id", "p": "probability"}, r"no column 'kind' and extra columns 'p'"),
        ("name,kind", {"kind": "class"}, "one column of .* must hold 'id'"),
    ):
        overrides = [] if columns is None else [written_columns(columns)]
        with pytest.raises(LockstepError, match=words):
            predict(run, data, sample(range(SIZE), header), *overrides, output=tmp_path / "out.csv")
    with pytest.raises(ConfigurationError, match=r"written as \.csv"):
        predict(run, data, sample(range(SIZE)), output=tmp_path / "out.jsonl")
    with pytest.raises(PredictionError, match="cannot be read"):
        predict(run, data, f"prediction.sample_submission={tmp_path}/none.csv", output=tmp_path / "out.csv")
    assert names(tmp_path) == []


# Commands


@single
def test_lockstep_checks_before_it_starts_anything(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import launch.local
    from runtime import cli

    def was_started(*args: Any, **options: Any) -> int:
        raise AssertionError("was started")

    monkeypatch.setattr(launch.local, "infer_locally", was_started)
    (tmp_path / "there.csv").write_text("")
    for arguments, code, words in (
        (["evaluate", str(run), "--checkpoint", "best:accuracy"], 2, "kept by 'accuracy'"),
        (["evaluate", str(run), "--split", "test"], 2, "there is no data.test in the configuration; it has: train, validation"),
        (["evaluate", str(run), "--checkpoint", "nothing"], 1, "there is no checkpoint nothing"),
        (["evaluate", str(run), "--weights", "averaged", "averaging=null"], 2, "no averaging"),
        (["evaluate", str(run), "output=elsewhere"], 2, "leave it out"),
        (["evaluate", str(tmp_path)], 2, "without a config.yaml"),
        (["predict", str(run), "--split", "validation", "--output", "x.txt"], 2, "must end in"),
        (["predict", str(run), "--split", "validation", "--output", f"{tmp_path}/there.csv"], 1, "already exists"),
        (["predict", str(run), "prediction.data=tiny:nothing"], 2, "prediction.data"),
        (["predict", str(run), "--split", "train", "prediction.top_k=2"], 2, "no column holds top_classes"),
    ):  # fmt: skip
        assert cli.main(arguments) == code, arguments
        out, err = capfd.readouterr()
        assert words in err, err
        assert err.startswith("lockstep: ")
        assert "Traceback" not in out + err
    with pytest.raises(AssertionError, match="was started"):
        cli.main(["predict", str(run), "--split", "validation", "--output", str(tmp_path / "new.csv")])


@single
def test_a_secret_that_the_run_folder_does_not_hold_is_asked_for(run: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "run"
    copy.mkdir()
    shutil.copytree(run / "checkpoints", copy / "checkpoints")
    text = (run / "config.yaml").read_text()
    (copy / "config.yaml").write_text(text.replace("size: 103", "size: 103\n      api_key: (hidden)"))
    with pytest.raises(ConfigurationError, match=r"config\.yaml:\d+ data\.validation\.args\.api_key: is a secret"):
        evaluate(copy)
    assert evaluate(copy, "data.validation.args={split: validation, size: 103}").step == 6


@single
def test_another_model_than_the_checkpoints_is_told(run: Path) -> None:
    with pytest.raises(CheckpointError, match="does not fit"):
        evaluate(run, "model.args.width=17")


@single
def test_what_was_evaluated_is_said_beside_what_training_reported(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert infer("evaluate", str(run)) == 0
    assert "in training" in capfd.readouterr().out
    assert infer("evaluate", str(run), "data.validation.args.size=50") == 0
    out, err = capfd.readouterr()
    assert "step-00000006" in out
    assert "raw weights, on 50 samples of data.validation" in out
    assert "in training" not in out  # they are other data's results
    assert "data.validation.args.size is 50; the checkpoint was made with 103" in err
    assert os.environ.get("LOCKSTEP_OUTCOME") is None


@pytest.mark.parametrize(("at", "code"), [(-1, 0), (40, 75), (-2, 2)])
@single
def test_what_came_of_it_gets_through_the_launcher(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, code: int
) -> None:
    """``accelerate launch`` turns every code but 0 into 1."""
    from launch import local

    def launcher(line: list[str], variables: dict[str, str]) -> int:
        assert variables["LOCKSTEP_WORLD_SIZE"] == "1"
        monkeypatch.setattr(os, "environ", {**os.environ, **variables})
        return min(1, infer("predict", *line[line.index(str(run)) :]))

    monkeypatch.setattr(local, "_run", launcher)
    data = f"prediction.data={{target: tiny_prediction:Inputs, args: {{at: {at}}}}}"
    arguments = [data, f"--output={tmp_path / 'out.csv'}", *(["prediction.columns={x: nothing}"] if at == -2 else [])]
    assert local.infer_locally("predict", run, arguments, processes=1, use_gpus=False) == code
    assert (tmp_path / "out.csv").exists() == (code == 0)
