"""The data sources give what they promise: whole, disjoint splits, and every byte exactly once."""

from __future__ import annotations

import importlib
import json
import json.decoder
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, TensorDataset

import runtime
from runtime.data_sources import SourceCode, diabetes, digits
from runtime.data_sources.source_code import END_OF_DOCUMENT, VOCAB_SIZE
from runtime.data_sources.token_chunks import IGNORED
from runtime.errors import DataError, MissingDependencyError

CONTEXT_LENGTH = 8


# Digits


def test_digits_splits_share_out_all_images_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    expected = sorted((*row / 16, label) for row, label in zip(pixels, labels, strict=True))
    found = []
    for split in ("train", "validation"):
        images, targets = digits(split, as_images=False).tensors
        found += [(*row, target) for row, target in zip(images.tolist(), targets.tolist(), strict=True)]
    assert sorted(found) == expected


def test_digits_have_documented_shapes_dtypes_and_range() -> None:
    images, targets = digits("train").tensors
    flat, _ = digits("train", as_images=False).tensors
    assert images.shape[1:] == (1, 8, 8)
    assert (images.dtype, targets.dtype) == (torch.float32, torch.int64)
    assert (images.min().item(), images.max().item()) == (0.0, 1.0)
    assert torch.equal(images.flatten(1), flat)


def test_digits_hold_out_the_same_share_of_every_class() -> None:
    _, train = digits("train", validation_fraction=0.25).tensors
    _, held_out = digits("validation", validation_fraction=0.25).tensors
    held_out_count = torch.bincount(held_out)
    total = torch.bincount(train) + held_out_count
    assert ((held_out_count - 0.25 * total).abs() < 1).all()


def test_digits_seed_decides_which_images_are_held_out() -> None:
    assert torch.equal(digits("validation", seed=1).tensors[0], digits("validation", seed=1).tensors[0])
    assert not torch.equal(digits("validation").tensors[0], digits("validation", seed=1).tensors[0])


# Diabetes


def test_diabetes_training_part_has_zero_mean_and_unit_variance() -> None:
    for part in diabetes("train").tensors:
        mean, variance = part.double().mean(dim=0), part.double().var(dim=0, correction=0)
        torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-6, rtol=0)
        torch.testing.assert_close(variance, torch.ones_like(variance), atol=1e-6, rtol=0)


def test_diabetes_is_standardised_by_the_training_part_alone() -> None:
    from sklearn.datasets import load_diabetes

    features, target = load_diabetes(return_X_y=True, scaled=False)
    train, validation = diabetes("train"), diabetes("validation")
    assert len(train) + len(validation) == 442
    # The map back to the target's units is the line through two patients of the training part.
    scores = torch.cat([train.tensors[1], validation.tensors[1]]).double().flatten().numpy()
    std = (target.max() - target.min()) / (scores.max() - scores.min())
    mean = target.max() - std * scores.max()
    np.testing.assert_allclose(np.sort(scores * std + mean), np.sort(target), rtol=1e-4)
    assert std == pytest.approx(78.30, abs=0.01)  # as the docstring says
    assert validation.tensors[0].mean(dim=0).abs().max() > 0.01
    assert features.shape[1] == train.tensors[0].shape[1]


def test_diabetes_targets_are_columns_of_float32() -> None:
    features, target = diabetes("validation").tensors
    assert features.shape[1:] == (10,)
    assert target.shape == (len(features), 1)
    assert (features.dtype, target.dtype) == (torch.float32, torch.float32)


Load = Callable[..., TensorDataset]


@pytest.mark.parametrize("load", [digits, diabetes])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "test"}, "'test' is unknown: use 'train' or 'validation'"),
        ({"split": "train", "validation_fraction": 1.0}, "validation_fraction=1.0"),
        ({"split": "train", "validation_fraction": 0.9999}, "validation_fraction=0.9999"),
    ],
)
def test_a_split_that_cannot_be_made_is_refused(load: Load, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(**arguments)


@pytest.mark.parametrize(("load", "name"), [(digits, "digits"), (diabetes, "diabetes")])
def test_without_scikit_learn_the_package_to_install_is_named(
    load: Load, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingDependencyError, match=f"the {name} data needs .*'scikit-learn'"):
        load("train")


def test_a_target_may_name_the_package_or_the_module() -> None:
    package = importlib.import_module("runtime.data_sources")
    for name in ("digits", "diabetes"):
        module = importlib.import_module(f"runtime.data_sources.{name}")
        assert getattr(package, name) is getattr(module, name)


# Source code


def write_documents(folder: Path) -> set[bytes]:
    """Fill a folder with documents of awkward lengths; return the contents, all different."""
    lengths = [1, 6, 7, 8, 9, 14, 15, 16, 17, 100, 256]  # around multiples of CONTEXT_LENGTH
    generator = np.random.default_rng(0)
    contents = {generator.integers(256, size=length, dtype=np.uint8).tobytes() for length in lengths}
    contents.add(bytes(range(256)))
    for index, content in enumerate(sorted(contents)):
        path = folder / f"package_{index % 3}" / f"module_{index}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (folder / "__init__.py").write_bytes(b"")
    return contents


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_documents(tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def load_source(split: str, folder: Path, cache: Path, **arguments: Any) -> SourceCode:
    settings = {"context_length": CONTEXT_LENGTH, "validation_fraction": 0.5, **arguments}
    return SourceCode(split, folder=folder, cache=cache, **settings)


def samples_of(dataset: SourceCode) -> list[tuple[Tensor, Tensor]]:
    return [dataset[index] for index in range(len(dataset))]


def documents_of(dataset: SourceCode) -> list[bytes]:
    """Join all targets of an epoch in order, and cut where a document ends."""
    documents, current = [], bytearray()
    for inputs, targets in samples_of(dataset):
        assert inputs.shape == targets.shape
        for target in targets[targets != IGNORED].tolist():
            if target == END_OF_DOCUMENT:
                documents.append(bytes(current))
                current.clear()
            else:
                current.append(target)
    assert not current, "the last document has no end"
    return documents


def test_every_byte_of_every_document_is_a_target_exactly_once(folder: Path, cache: Path) -> None:
    found = documents_of(load_source("train", folder, cache))
    found += documents_of(load_source("validation", folder, cache))
    files = [path.read_bytes() for path in folder.rglob("*.py")]
    assert sorted(found) == sorted(content for content in files if content)


def test_every_target_follows_its_input_within_one_document(folder: Path, cache: Path) -> None:
    dataset = load_source("train", folder, cache)
    previous = END_OF_DOCUMENT
    for inputs, targets in samples_of(dataset):
        count = int((targets != IGNORED).sum())
        assert inputs[0] == previous, "the first input is the last target of the chunk before"
        assert torch.equal(inputs[1:count], targets[: count - 1])
        assert (targets[: count - 1] != END_OF_DOCUMENT).all(), "a chunk crosses documents"
        assert (inputs[count:] == END_OF_DOCUMENT).all()
        assert (targets[count:] == IGNORED).all()
        previous = int(targets[count - 1])


def test_a_documents_last_chunk_alone_is_short(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    # 20 bytes and an end are 21 targets: chunks of 8, 8 and 5.
    (source / "a.py").write_bytes(b"x" * 20)
    (source / "b.py").write_bytes(b"y" * 15)  # 16 targets: 8 and 8
    dataset = load_source("train", source, tmp_path, validation_fraction=1e-9)
    assert [int((targets != IGNORED).sum()) for _, targets in samples_of(dataset)] == [
        8,
        8,
        5,
        8,
        8,
    ]


def test_whole_batches_equal_stacked_samples(folder: Path, cache: Path) -> None:
    dataset = load_source("train", folder, cache)
    indices = torch.randint(len(dataset), (50,)).tolist()
    inputs, targets = dataset.__getitems__(indices)
    assert (inputs.dtype, targets.dtype) == (torch.int64, torch.int64)
    assert torch.equal(inputs, torch.stack([dataset[index][0] for index in indices]))
    assert torch.equal(targets, torch.stack([dataset[index][1] for index in indices]))
    assert inputs.max() < VOCAB_SIZE


def test_torchs_loader_fetches_whole_batches(folder: Path, cache: Path) -> None:
    dataset = load_source("train", folder, cache)
    batches = BatchSampler(SequentialSampler(dataset), batch_size=4, drop_last=False)
    loader = DataLoader(dataset, batch_sampler=batches, collate_fn=lambda batch: batch)
    inputs = torch.cat([inputs for inputs, _ in loader])
    assert torch.equal(inputs, torch.stack([inputs for inputs, _ in samples_of(dataset)]))


@pytest.mark.parametrize("index", [-1, 10**6])
def test_an_index_outside_the_data_is_refused(index: int, folder: Path, cache: Path) -> None:
    with pytest.raises(IndexError, match="indices must lie between 0 and"):
        load_source("train", folder, cache).__getitems__([0, index])


def test_no_document_is_in_both_splits_even_under_two_names(tmp_path: Path) -> None:
    contents = write_documents(tmp_path / "source" / "first")
    write_documents(tmp_path / "source" / "second")
    train = documents_of(load_source("train", tmp_path / "source", tmp_path))
    validation = documents_of(load_source("validation", tmp_path / "source", tmp_path))
    assert set(train) | set(validation) == contents
    assert not set(train) & set(validation)
    assert sorted(train + validation) == sorted([*contents, *contents])


def test_validation_fraction_is_the_expected_share_of_documents(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for index in range(400):
        (source / f"{index}.py").write_text(str(index))
    dataset = load_source("validation", source, tmp_path, validation_fraction=0.25)
    # One chunk per document; binomial, so the standard deviation is sqrt(400 * 0.25 * 0.75) = 8.7.
    assert abs(len(dataset) - 100) < 4 * 8.7


def test_seed_decides_which_documents_are_held_out(folder: Path, cache: Path) -> None:
    splits = {tuple(documents_of(load_source("train", folder, cache, seed=s))) for s in range(4)}
    assert len(splits) > 1
    assert len(list(cache.iterdir())) == 1, "all seeds share one token file"


def test_foreign_code_and_tests_are_passed_over(folder: Path, cache: Path) -> None:
    before = load_source("train", folder, cache).fingerprint
    for name in ("site-packages/numpy", "test", "json/tests", "__pycache__", "lib2to3"):
        (folder / name).mkdir(parents=True)
        (folder / name / "module.py").write_text("foreign")
    (folder / "notes.txt").write_text("no source")
    (folder / "dangling.py").symlink_to("nowhere")
    assert load_source("train", folder, cache).fingerprint == before


def test_the_standard_library_is_the_default_source(cache: Path) -> None:
    dataset = SourceCode("validation", context_length=128, cache=cache)
    (path,) = cache.iterdir()
    tokens = np.fromfile(path, dtype="<u2")
    ends = np.flatnonzero(tokens == END_OF_DOCUMENT)
    code = Path(json.decoder.__file__).read_bytes()
    (length_matches,) = np.nonzero(np.diff(ends) == len(code) + 1)
    assert code in {
        tokens[ends[document] + 1 : ends[document + 1]].astype(np.uint8).tobytes() for document in length_matches
    }
    _, targets = dataset.__getitems__(list(range(len(dataset))))
    share = int((targets != IGNORED).sum()) / len(tokens)
    assert 0.01 < share < 0.2
    weights = (targets != IGNORED).sum(dim=1)
    assert len(set(weights.tolist())) > 5, "samples have uneven weights"


def test_a_changed_file_of_the_same_size_makes_a_new_token_file(folder: Path, cache: Path) -> None:
    before = load_source("train", folder, cache)
    (folder / "package_0" / "module_0.py").write_bytes(b"!")
    splits = [load_source(split, folder, cache) for split in ("train", "validation")]
    assert before.fingerprint not in {dataset.fingerprint for dataset in splits}
    assert b"!" in documents_of(splits[0]) + documents_of(splits[1])


def test_fingerprint_names_everything_that_decides_a_sample(folder: Path, cache: Path) -> None:
    variants: list[dict[str, Any]] = [
        {},
        {"context_length": 9},
        {"validation_fraction": 0.4},
        {"seed": 1},
    ]
    found = {load_source("train", folder, cache, **variant).fingerprint for variant in variants}
    found.add(load_source("validation", folder, cache).fingerprint)
    assert len(found) == 5


def test_fingerprint_is_the_same_wherever_the_source_lies(tmp_path: Path) -> None:
    write_documents(tmp_path / "here")
    write_documents(tmp_path / "tests" / "there")
    here = load_source("train", tmp_path / "here", tmp_path / "cache_1")
    there = load_source("train", tmp_path / "tests" / "there", tmp_path / "cache_2")
    assert here.fingerprint == there.fingerprint
    assert documents_of(here) == documents_of(there)


def test_pickling_carries_no_tokens_and_the_copy_reads_the_same(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "long.py").write_bytes(b"print(1)\n" * 100_000)
    dataset = load_source("train", source, tmp_path, validation_fraction=1e-9)
    pickled = pickle.dumps(dataset)
    assert len(pickled) < 5_000
    copy = pickle.loads(pickled)
    assert copy.fingerprint == dataset.fingerprint
    assert all(map(torch.equal, copy.__getitems__([0, 77]), dataset.__getitems__([0, 77])))


def num_open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts open files through /proc")
def test_no_file_stays_open_behind_a_data_set(folder: Path, cache: Path) -> None:
    before = num_open_files()
    dataset = load_source("train", folder, cache)
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy[0][0].shape == (CONTEXT_LENGTH,)
    del dataset, copy
    # Fewer, where a collection happened to close another test's.
    assert num_open_files() <= before


def test_cache_follows_the_xdg_specification(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for value, expected in [
        (str(tmp_path / "xdg"), tmp_path / "xdg"),
        ("", tmp_path / "home" / ".cache"),
    ]:
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        SourceCode("train", context_length=8, folder=folder)
        assert len(list((expected / "lockstep").glob("*.tokens"))) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "test"}, "'test' is unknown: use 'train' or 'validation'"),
        ({"context_length": 0}, "context_length=0"),
        ({"validation_fraction": 0.0}, "validation_fraction=0.0"),
        ({"folder": "/nowhere"}, "folder /nowhere does not exist"),
        ({"validation_fraction": 1e-9, "split": "validation"}, "is in the validation split"),
    ],
)
def test_an_impossible_argument_is_named(arguments: dict[str, Any], message: str, folder: Path, cache: Path) -> None:
    settings = {"split": "train", "context_length": 8, "folder": folder, **arguments}
    with pytest.raises(DataError, match=message):
        SourceCode(cache=cache, **settings)


def test_a_folder_without_source_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.py").write_bytes(b"")
    with pytest.raises(DataError, match="holds no Python source"):
        load_source("train", tmp_path, tmp_path / "cache")


def test_a_cache_that_cannot_be_written_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=f"{tmp_path / 'file'}.*give another folder as cache"):
        load_source("train", folder, tmp_path / "file")


def test_a_token_file_of_the_wrong_size_is_written_anew(folder: Path, cache: Path) -> None:
    expected = documents_of(load_source("train", folder, cache))
    (path,) = cache.iterdir()
    path.write_bytes(path.read_bytes()[:100])
    assert documents_of(load_source("train", folder, cache)) == expected


def test_a_build_that_fails_leaves_nothing_behind(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(DataError, match="No space left on device"):
        load_source("train", folder, cache)
    assert not list(cache.iterdir())


# Real processes: one interpreter is started for all of them, as importing torch takes seconds.

NUM_BUILDERS = 4
SCRIPT = """
import json, os, signal, sys, time
from pathlib import Path
import runtime.model_zoo
from runtime.data_sources import SourceCode

folder, together, killed = map(Path, sys.argv[1:4])
num_builders = int(sys.argv[4])
report = {"imported": sorted(sys.modules)}

def build(cache, fsync):
    process = os.fork()
    if process == 0:
        status = 1
        try:
            os.fsync = fsync
            SourceCode(
                "train", context_length=8, validation_fraction=0.5, folder=folder, cache=cache
            )
            status = 0
        finally:
            os._exit(status)
    return process

def wait_for_the_others(descriptor):
    # Nobody finishes before all are in the middle of it.
    deadline = time.monotonic() + 120
    with open(together / "arrived", "ab") as file:
        file.write(b"x")
    while (together / "arrived").stat().st_size < num_builders:
        assert time.monotonic() < deadline, "the builds never overlapped"
        time.sleep(0.002)

def die(descriptor):
    os.kill(os.getpid(), signal.SIGKILL)

builders = [build(together, wait_for_the_others) for _ in range(num_builders)]
report["together"] = [os.waitstatus_to_exitcode(os.waitpid(p, 0)[1]) for p in builders]
report["killed"] = os.waitstatus_to_exitcode(os.waitpid(build(killed, die), 0)[1])
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Let several processes build at once and kill another; return their folder and report."""
    root = tmp_path_factory.mktemp("processes")
    write_documents(root / "source")
    (root / "together").mkdir()
    folders = [str(root / name) for name in ("source", "together", "killed")]
    result = subprocess.run(
        [sys.executable, "-P", "-c", SCRIPT, *folders, str(NUM_BUILDERS)],
        env={**os.environ, "PYTHONPATH": str(Path(runtime.__file__).parents[1])},
        capture_output=True,
        check=False,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return root, json.loads(result.stdout)


def test_importing_models_and_data_sources_imports_no_optional_package(
    processes: tuple[Path, dict[str, Any]],
) -> None:
    _, report = processes
    assert not {"sklearn", "scipy", "pandas"} & set(report["imported"])


def test_several_processes_may_build_at_once(processes: tuple[Path, dict[str, Any]]) -> None:
    root, report = processes
    assert report["together"] == [0] * NUM_BUILDERS
    (root / "together" / "arrived").unlink(missing_ok=True)
    assert len(list((root / "together").iterdir())) == 1, "one token file and nothing else"
    alone = load_source("train", root / "source", root / "alone")
    built = load_source("train", root / "source", root / "together")
    assert documents_of(built) == documents_of(alone)


def test_a_killed_build_leaves_nothing_that_is_used(
    processes: tuple[Path, dict[str, Any]],
) -> None:
    root, report = processes
    assert report["killed"] == -signal.SIGKILL
    (partial,) = (root / "killed").iterdir()
    assert partial.suffix != ".tokens"
    partial.write_bytes(b"")
    dataset = load_source("train", root / "source", root / "killed")
    assert documents_of(dataset) == documents_of(load_source("train", root / "source", root / "alone"))
    assert partial.read_bytes() == b""
