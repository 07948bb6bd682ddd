"""Readers of the user's files against NumPy, pyarrow, Pillow and scikit-learn; what is wrong is told in one message."""

from __future__ import annotations

import csv
import gzip
import json
import pickle
import struct
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from runtime.data.order import IndexOrder
from runtime.data.transforms import Augment
from runtime.data_sources import Arrays, Idx, ImageFolder, LabelledTexts, Table, TextLines, TokenFile
from runtime.data_sources.token_chunks import IGNORED
from runtime.errors import DataError
from tests.reading import equal, read_steps

GENERATOR = np.random.default_rng(5)
FEATURES = GENERATOR.normal(3, 2, (23, 4))
LABELS = GENERATOR.integers(0, 3, 23)
ROWS: list[dict[str, Any]] = [
    {
        "age": 30 + i,
        "city": ["Rome", "Oslo", "", "Bonn"][i % 4],
        "pay": "" if i % 5 == 0 else f"{i * 1.5}",
        "out": i % 3,
    }
    for i in range(23)
]


def write_csv(path: Path, rows: list[dict[str, Any]] = ROWS, delimiter: str = ",") -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_idx(path: Path, array: np.ndarray) -> Path:
    codes = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}
    header = struct.pack(f">HBB{array.ndim}I", 0, codes[array.dtype.str[1:]], array.ndim, *array.shape)
    content = header + array.astype(array.dtype.newbyteorder(">")).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def write_images(folder: Path, sizes: tuple[int, ...] = (12, 9, 16)) -> Path:
    from PIL import Image

    for number, name in enumerate(("cat", "newt")):
        for i, size in enumerate(sizes):
            place = folder / name / ("deep" if i == 2 else "")
            place.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(10 * number + i).integers(0, 256, (size, size + 2, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(place / f"{i}.png")
    (folder / "newt" / "notes.txt").write_text("no image")
    return folder


# Arrays


@pytest.mark.parametrize("kind", ["npy", "npz", "compressed"])
def test_arrays_are_numpys(tmp_path: Path, kind: str) -> None:
    np.save(tmp_path / "x.npy", FEATURES)
    np.save(tmp_path / "y.npy", LABELS.astype(np.uint16))
    save = np.savez_compressed if kind == "compressed" else np.savez
    save(tmp_path / "both.npz", inputs=np.asfortranarray(FEATURES), target=LABELS.astype(">i4"))
    npy = {"inputs": f"{tmp_path}/x.npy", "target": f"{tmp_path}/y.npy"}
    source = Arrays(npy if kind == "npy" else f"{tmp_path}/both.npz")
    batch = pickle.loads(pickle.dumps(source)).__getitems__([5, 0, 22])
    assert equal(batch["inputs"], torch.tensor(FEATURES[[5, 0, 22]], dtype=torch.float32))
    assert equal(batch["target"], torch.tensor(LABELS[[5, 0, 22]]))
    assert equal(source[5], {name: part[0] for name, part in batch.items()})
    assert len(source) == 23
    assert source.column("target").tolist() == LABELS.tolist()
    mapped = source._arrays["inputs"]
    while mapped.base is not None and not isinstance(mapped, np.memmap):
        mapped = mapped.base
    assert isinstance(mapped, np.memmap) == (kind != "compressed")


def test_arrays_keep_doubles_and_images_when_asked_to(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=FEATURES, image=FEATURES.astype(np.uint8), flag=FEATURES > 3)
    parts = Arrays(f"{tmp_path}/a.npz", floating=None)[2]
    assert [part.dtype for part in parts.values()] == [torch.float64, torch.uint8, torch.bool]
    assert Arrays({"x": f"{tmp_path}/a.npz:x"}).fingerprint != Arrays({"x": f"{tmp_path}/a.npz:flag"}).fingerprint


# Tables


def fitted_on(rows: list[int]) -> tuple[np.ndarray, Any, Any]:
    """Inputs by scikit-learn: what a table of ROWS must give, fitted on some rows."""
    from sklearn.impute import SimpleImputer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    numbers = np.array([[row["age"], float(row["pay"] or "nan")] for row in ROWS])
    cities = np.array([[row["city"] or "~"] for row in ROWS])  # missing is a category of its own, and the last
    scaled = make_pipeline(SimpleImputer(), StandardScaler()).fit(numbers[rows]).transform(numbers)
    hot = OneHotEncoder(handle_unknown="ignore", sparse_output=False).fit(cities[rows]).transform(cities)
    return np.concatenate([scaled, hot], axis=1), numbers, cities


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize("rows", [list(range(23)), [1, 4, 5, 8, 9, 12, 13]])  # the second has no Oslo... nor a Bonn
def test_a_table_is_prepared_as_scikit_learn_does_fitted_on_training_rows_alone(
    tmp_path: Path, kind: str, rows: list[int]
) -> None:
    path = write_csv(tmp_path / "t.csv", delimiter=";")
    options: dict[str, Any] = {"delimiter": ";"}
    if kind == "parquet":
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq

        columns = {
            "age": [row["age"] for row in ROWS],
            "city": pa.array([row["city"] or None for row in ROWS]),
            "pay": pa.array([float(row["pay"]) if row["pay"] else None for row in ROWS]),
            "out": [row["out"] for row in ROWS],
        }
        path, options = tmp_path / "t.parquet.brotli", {}
        pq.write_table(pa.table(columns), path, compression="brotli", row_group_size=5)
    source = Table(str(path), target="out", task="classification", categorical=["city"], missing="mean", **options)
    source.fit(np.array(rows))
    expected, _, _ = fitted_on(rows)
    batch = source.__getitems__(list(range(23)))
    np.testing.assert_allclose(batch["inputs"].numpy(), expected, atol=1e-6)
    assert batch["target"].tolist() == [row["out"] for row in ROWS]
    assert len(source.features) == expected.shape[1]
    again = Table(str(path), target="out", task="classification", categorical=["city"], missing="mean", **options)
    assert again.fingerprint == source.fingerprint if len(rows) == 23 else again.fingerprint != source.fingerprint
    (tmp_path / "preprocessing.json").write_text(json.dumps(source.fitted))
    stored = Table(
        str(path), target="out", task="classification", categorical=["city"], missing="mean",
        preprocessing=f"{tmp_path}/preprocessing.json", **options,
    )  # fmt: skip
    stored.fit(np.arange(3))
    assert equal(stored.__getitems__([3, 4]), source.__getitems__([3, 4]))


def test_codes_indicators_medians_and_kept_columns(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv")
    source = Table(
        str(path), target=["age", "out"], task="regression", categorical=["city"], categorical_as="codes", numeric=["pay"],
        missing="median", indicators=True, standardize=False,
    )  # fmt: skip
    source.fit(np.array([1, 3, 5]))  # Oslo, Bonn, Oslo; 1.5, 4.5 and a missing pay
    batch = source.__getitems__([0, 1, 2, 3])
    assert batch["numeric"].tolist() == [[3.0, 1.0], [1.5, 0.0], [3.0, 0.0], [4.5, 0.0]]  # the median of 1.5 and 4.5
    assert batch["categorical"].tolist() == [[0], [2], [0], [1]]
    assert batch["target"].tolist() == [[30, 0], [31, 1], [32, 2], [33, 0]]
    kept = Table(str(path), numeric=["age"], keep=["out", "city"], standardize=False)[2]
    assert (kept["inputs"].tolist(), int(kept["out"]), kept["city"]) == ([32.0], 2, None)


def test_binary_and_standardised_targets(tmp_path: Path) -> None:
    rows = [{"x": i, "y": 2.0 * i, "z": "10" if i % 2 else "9"} for i in range(10)]
    path = str(write_csv(tmp_path / "t.csv", rows))
    binary = Table(path, target="z", task="binary", numeric=["x"])
    assert binary.classes == ["9", "10"]  # sorted as numbers
    assert binary.__getitems__([0, 1])["target"].tolist() == [[0.0], [1.0]]
    scaled = Table(path, target="y", task="regression", numeric=["x"], standardize_target=True)
    batch = scaled.__getitems__(list(range(10)))
    assert equal(batch["inputs"], batch["target"])
    assert batch["target"].std(correction=0).item() == pytest.approx(1)


# Images, IDX, texts, tokens


def test_images_are_pillows(tmp_path: Path) -> None:
    image_module = pytest.importorskip("PIL.Image")
    folder = write_images(tmp_path / "photos")
    source = ImageFolder(str(folder), size=[8, 8], mean=[0.5, 0.4, 0.3], std=[0.2, 0.2, 0.1])
    assert source.classes == ["cat", "newt"]
    assert source.column("target").tolist() == [0, 0, 0, 1, 1, 1]
    image = image_module.open(folder / "newt" / "1.png").resize((8, 8), image_module.BICUBIC, box=(1, 0, 10, 9))
    expected = (np.asarray(image) / 255 - [0.5, 0.4, 0.3]) / [0.2, 0.2, 0.1]
    np.testing.assert_allclose(source[4]["inputs"].numpy(), np.moveaxis(expected, -1, 0), atol=1e-5)
    without = ImageFolder(str(folder), exclude=[source._paths[0]])
    assert len(without) == len(source) - 1 and without.fingerprint != source.fingerprint
    plain = ImageFolder(str(folder), channels=1)[2]
    grey = np.asarray(image_module.open(folder / "cat" / "deep" / "2.png").convert("L")) / 255
    np.testing.assert_allclose(plain["inputs"].numpy(), grey[None], atol=1e-6)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files_are_read_as_their_numbers(tmp_path: Path, suffix: str) -> None:
    pixels = GENERATOR.integers(0, 256, (23, 5, 4), dtype=np.uint8)
    write_idx(tmp_path / f"t10k-images-idx3-ubyte{suffix}", pixels)
    write_idx(tmp_path / f"t10k-labels-idx1-ubyte{suffix}", LABELS.astype(np.uint8))
    source = pickle.loads(pickle.dumps(Idx(str(tmp_path), "test", mean=0.25, std=0.5)))
    batch = source.__getitems__([7, 1])
    np.testing.assert_allclose(batch["inputs"].numpy(), (pixels[[7, 1], None] / 255 - 0.25) / 0.5, atol=1e-6)
    assert batch["target"].tolist() == LABELS[[7, 1]].tolist()


@pytest.mark.parametrize("dtype", ["i1", "i2", "i4", "f4", "f8"])
def test_every_type_of_an_idx_file_is_read(tmp_path: Path, dtype: str) -> None:
    from runtime.data_sources.idx import read_idx

    values = (FEATURES * 10).astype(dtype)
    assert read_idx(write_idx(tmp_path / "x", values)).tolist() == values.tolist()


def test_lines_and_labelled_texts(tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_bytes("één\r\n\ntwo\x0ctwo\nthree".encode())
    lines = TextLines(f"{tmp_path}/lines.txt")
    assert [sample["inputs"] for sample in lines.__getitems__([0, 1, 2])] == ["één", "two\x0ctwo", "three"]
    assert lines.column("length").tolist() == [3, 7, 5]
    as_bytes = TextLines(f"{tmp_path}/lines.txt", tokenizer="bytes")[0]["inputs"]
    assert bytes(as_bytes.tolist()).decode() == "één"
    rows = [{"text": f"a, {i} words", "label": ["spam", "ham"][i % 2]} for i in range(6)]
    path = str(write_csv(tmp_path / "t.csv", rows))
    texts = LabelledTexts(
        path,
        text="text",
        target="label",
        tokenizer=padded_lengths,  # type: ignore[arg-type]  # whose other arguments tokenize holds
        tokenize={"longest": 9},
    )
    batch = texts.__getitems__([0, 3])
    assert batch["input_ids"].tolist() == [[9] * 9, [9] * 9]
    assert batch["target"].tolist() == [1, 0]
    assert texts.classes == ["ham", "spam"]
    assert equal(texts[3], {"input_ids": batch["input_ids"][1], "target": 0})
    plain = LabelledTexts(path, text="text", target="label").__getitems__([1])
    assert plain == [{"inputs": "a, 1 words", "target": 0}]


def padded_lengths(texts: list[str], *, longest: int) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.full((len(texts), longest), len(texts[0]) - 1)}


@pytest.mark.parametrize(("dtype", "skip"), [("uint16", 0), ("uint32", 8)])
@pytest.mark.parametrize("ends_whole", [True, False])
def test_every_token_is_a_target_once_and_no_chunk_crosses_a_document(
    tmp_path: Path, dtype: str, skip: int, ends_whole: bool
) -> None:
    documents = [[1, 2, 3, 4, 5, 6, 7], [8], [9, 10, 11], []]
    tokens = [token for document in documents for token in (*document, 99)][: None if ends_whole else -2]
    np.concatenate([np.zeros(skip, "u1"), np.array(tokens, f"<{dtype[0]}{int(dtype[4:]) // 8}").view("u1")]).tofile(
        tmp_path / "t.bin"
    )
    made = TokenFile(f"{tmp_path}/t.bin", context_length=3, dtype=dtype, end_of_document=99, skip_bytes=skip)
    source = pickle.loads(pickle.dumps(made))
    pairs = []
    for index in range(len(source)):
        sample = source[index]
        inputs, target = sample["inputs"].tolist(), sample["target"].tolist()
        assert 99 not in inputs[1 : target.index(IGNORED) if IGNORED in target else None]
        assert {a for a, b in zip(inputs, target, strict=True) if b == IGNORED} <= {99, tokens[-1]}
        pairs += [(a, b) for a, b in zip(inputs, target, strict=True) if b != IGNORED]
    assert pairs == list(pairwise(tokens))
    assert np.unique(source.column("document")).tolist() == list(range(4 if ends_whole else 3))
    whole = TokenFile(f"{tmp_path}/t.bin", context_length=4, dtype=dtype, skip_bytes=skip)
    assert len(whole) == -(-(len(tokens) - 1) // 4)


# What is wrong


def fitted_table(folder: Path, rows: list[int]) -> Table:
    found = Table(f"{folder}/table.csv", numeric=["age"], target="out", task="classification")
    found.fit(np.array(rows))
    return found


CASES: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "file": (lambda at: Table(f"{at}/tabel.csv"), ["no file", "did you mean", "table.csv"]),
    "folder": (lambda at: TextLines(f"{at}/missing/x.txt"), ["there is no folder", "missing"]),
    "package": (
        lambda at: Idx(f"{at}/fashion", "train", provided_by="apt install fashion"),
        ["no folder", "to get it: apt install fashion"],
    ),
    "column": (lambda at: Table(f"{at}/table.csv", numeric=["aeg"]), ["no column 'aeg'", "did you mean 'age'"]),
    "no number": (lambda at: Table(f"{at}/table.csv"), ["table.csv:2", "'Rome'", "column 'city'", "categorical"]),
    "missing": (lambda at: Table(f"{at}/table.csv", numeric=["pay"]), ["'pay'", "5 of 23", "row 0", "missing: mean"]),
    "ragged": (lambda at: Table(f"{at}/ragged.csv"), ["ragged.csv:3 has 1 values", "2 columns"]),
    "encoding": (lambda at: Table(f"{at}/latin.csv"), ["latin.csv", "utf-8"]),
    "quotes": (lambda at: Table(f"{at}/quotes.csv"), ["quotes.csv"]),
    "task": (lambda at: Table(f"{at}/table.csv", target="out"), ["'target' and 'task'"]),
    "unknown class": (
        lambda at: fitted_table(at, [0, 1])[2],
        ["'out' has '2'", "not in the training rows"],
    ),
    "two classes": (
        lambda at: Table(f"{at}/table.csv", numeric=["age"], target="out", task="binary").fitted,
        ["3 classes", "'binary' needs two"],
    ),
    "parquet": (lambda at: Table(f"{at}/broken.parquet"), ["not a Parquet file"]),
    "npz": (lambda at: Arrays({"x": f"{at}/a.npz:y"}), ["no member 'y'", "it has x"]),
    "which member": (lambda at: Arrays({"x": f"{at}/a.npz"}), ["name a member of"]),
    "no npz": (lambda at: Arrays(f"{at}/table.csv"), ["not an .npz file"]),
    "objects": (lambda at: Arrays({"x": f"{at}/objects.npy"}), ["objects.npy", "Python objects"]),
    "length": (lambda at: Arrays({"x": f"{at}/a.npz:x", "y": f"{at}/long.npy"}), ["x has 3", "y has 4"]),
    "magic": (lambda at: Idx(images=f"{at}/table.csv", labels=f"{at}/table.csv"), ["not an IDX file"]),
    "short": (lambda at: Idx(images=f"{at}/short", labels=f"{at}/short"), ["its header requires"]),
    "split": (lambda at: Idx(f"{at}", "trian"), ["'trian'", "did you mean 'train'"]),
    "classes": (lambda at: ImageFolder(f"{at}/empty"), ["holds neither class folders"]),
    "nothing excluded": (lambda at: ImageFolder(f"{at}/fake", exclude=["*.jpg"]), ["exclude", "'*.jpg'"]),
    "no image": (lambda at: ImageFolder(f"{at}/folder"), ["holds no image"]),
    "not an image": (lambda at: ImageFolder(f"{at}/fake")[0], ["bad.png", "cannot be read as an image"]),
    "tokens": (lambda at: TokenFile(f"{at}/odd.bin", context_length=2), ["3 bytes", "uint16"]),
    "tokenizer": (lambda at: TextLines(f"{at}/table.csv", tokenizer="byte"), ["'byte' is unknown", "'bytes'"]),
}


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_is_one_message(tmp_path: Path, case: str) -> None:
    write_csv(tmp_path / "table.csv")
    (tmp_path / "ragged.csv").write_text("a,b\n1,2\n3\n")
    (tmp_path / "latin.csv").write_bytes("a,b\n1,é\n".encode("latin1"))
    (tmp_path / "quotes.csv").write_text('a,b\n1,"x"y\n')
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and nothing else")
    np.savez(tmp_path / "a.npz", x=np.arange(3))
    np.save(tmp_path / "long.npy", np.arange(4))
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    (tmp_path / "short").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 9, 1]))
    (tmp_path / "odd.bin").write_bytes(b"abc")
    for name in ("empty", "folder/cat", "fake/cat"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "fake" / "cat" / "bad.png").write_text("no image")
    if case == "parquet":
        pytest.importorskip("pyarrow")
    if case in ("classes", "no image", "not an image"):
        pytest.importorskip("PIL")
    make, words = CASES[case]
    with pytest.raises(DataError) as told:
        make(tmp_path)
    assert all(word in str(told.value) for word in words), str(told.value)
    assert "\n" not in str(told.value)


# Any number of ranks and workers


def readers(folder: Path) -> dict[str, tuple[Any, Any]]:
    np.savez(folder / "a.npz", inputs=FEATURES, target=LABELS)
    write_idx(folder / "train-images-idx3-ubyte", GENERATOR.integers(0, 256, (23, 8, 8), dtype=np.uint8))
    write_idx(folder / "train-labels-idx1-ubyte", LABELS.astype(np.uint8))
    GENERATOR.integers(0, 9, 90).astype("<u2").tofile(folder / "t.bin")
    table = Table(str(write_csv(folder / "t.csv")), target="out", task="classification", categorical=["city", "pay"])
    found: dict[str, tuple[Any, Any]] = {
        "arrays": (Arrays(f"{folder}/a.npz"), None),
        "table": (table, None),
        "idx": (Idx(str(folder), "train"), None),
        "idx augmented": (Idx(str(folder), "train"), Augment(crop=[6, 6], padding=2, flip=0.5)),
        "tokens": (TokenFile(f"{folder}/t.bin", context_length=4, end_of_document=0), None),
        "texts": (LabelledTexts(str(folder / "t.csv"), text="city", target="out"), None),
    }
    try:
        write_images(folder / "photos")
    except ModuleNotFoundError:
        return found
    augment = Augment(crop=[6, 6], scale=[0.3, 1.0], flip=0.5)
    return {**found, "images augmented": (ImageFolder(str(folder / "photos")), augment)}


def test_every_reader_gives_the_same_to_any_number_of_ranks_and_workers(tmp_path: Path) -> None:
    for name, (source, transform) in readers(tmp_path).items():
        order = partial(IndexOrder, len(source), batch_size=5, seed=1, shuffle=True, drop_last=False)
        alone = read_steps(source, order, transform=transform)
        for world_size, num_workers in ((2, 0), (3, 0), (1, 2)):
            if num_workers and "augmented" not in name and name != "table":
                continue  # starting workers is what takes time
            found = read_steps(source, order, world_size=world_size, num_workers=num_workers, transform=transform)
            assert found.keys() == alone.keys()
            assert all(equal(found[cursor], slots) for cursor, slots in alone.items()), (name, world_size, num_workers)
        if transform is not None:  # another draw in another epoch, for every sample
            by_id = [dict(zip(ids_of(order(), epoch), rows_of(alone, epoch), strict=True)) for epoch in (0, 1)]
            same = sum(torch.equal(row, by_id[1][i]) for i, row in by_id[0].items())
            assert same < len(source) / 4


def ids_of(order: IndexOrder, epoch: int) -> list[int]:
    return [int(i) for index in range(order.num_batches(epoch)) for i in order.batch(epoch, index)]


def rows_of(steps: dict[Any, list[Any]], epoch: int) -> list[torch.Tensor]:
    return [row for cursor, slots in steps.items() if cursor.epoch == epoch for slot in slots for row in slot["inputs"]]


def init_that_draws(worker: int) -> None:
    """What tutorials tell users to do: seed each worker by its number."""
    torch.manual_seed(worker)
    np.random.seed(worker)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_workers_own_start_does_not_change_a_samples_seed(tmp_path: Path) -> None:
    source, transform = readers(tmp_path)["idx augmented"]
    order = partial(IndexOrder, 23, batch_size=5, seed=1, shuffle=True, drop_last=False)
    alone = read_steps(source, order, transform=transform)
    found = read_steps(source, order, transform=transform, num_workers=2, worker_init=init_that_draws)
    assert all(equal(found[cursor], slots) for cursor, slots in alone.items())


def test_a_workers_own_start_is_run_in_every_worker(tmp_path: Path) -> None:
    source, _ = readers(tmp_path)["idx"]
    order = partial(IndexOrder, 23, batch_size=5, seed=1, shuffle=True, drop_last=False)
    read_steps(source, order, num_workers=2, worker_init=lambda worker: (tmp_path / f"worker-{worker}").touch())
    assert sorted(path.name for path in tmp_path.glob("worker-*")) == ["worker-0", "worker-1"]
