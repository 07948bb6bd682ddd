"""An exported file holds what the checkpoint holds, bit for bit, or there is no file."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from runtime.checkpoints.snapshot import HostBuffers
from runtime.cli import main
from runtime.commands import weights_file as module
from runtime.commands.weights_file import export
from runtime.config.learning import AveragingSection
from runtime.errors import CheckpointError, ConfigurationError
from runtime.objective import TrainingModule
from runtime.optimization.averaging import WeightAverage
from tests.observed import configuration, observe
from tests.project import tiny
from tests.test_checkpoint import folder, save
from tests.test_inspection import on_disk, rolled_back, spoil

SUFFIXES = pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool,
)  # fmt: skip


class Tied(nn.Module):
    """Input and output embedding are one parameter; an integer buffer and a constant one beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight


class WithExtraState(nn.Linear):
    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 3}

    def set_extra_state(self, state: Any) -> None:
        pass


def read(path: Path) -> dict[str, Tensor]:
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


def exported(source: Path, out: Path, **options: Any) -> dict[str, Tensor]:
    export(source, out, warn=lambda text: None, **options)
    return read(out)


def written(path: Path, model: dict[str, Any], **training: Any) -> Path:
    state = {"model": model, "training": training}
    return folder(path).write(HostBuffers().copy(state, step=3, attempt=0, epoch=2, results={}))


def kept(average: dict[str, Tensor]) -> dict[str, Any]:
    """What a checkpoint holds of an average."""
    return {"average": average, "count": 1, "statistics": {}, "statistics_of": None}


def assert_same_bits(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (state[name].shape, state[name].dtype) == (tensor.shape, tensor.dtype), name
        bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (state[name], tensor)]
        assert torch.equal(*bits), name


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A real run with BatchNorm and an average, which its results are those of; and what was observed of it."""
    path = tmp_path_factory.mktemp("run")
    points = {"target": "tiny:points", "args": {}}
    config = configuration(
        path,
        name="moons",
        data={"train": points, "validation": {**points, "args": {"split": "validation"}}},
        objective={"target": "CrossEntropyLoss"},
        averaging={"decay": 0.8},
        limit={"steps": 5},
        checkpoint={"every": "1 step", "keep": 9},
        evaluation={"every": "5 steps"},
    )
    return path, observe(config)


@SUFFIXES
def test_raw_weights_load_into_the_bare_model(run: tuple[Path, dict[str, Any]], tmp_path: Path, suffix: str) -> None:
    path, observed = run
    state = exported(path, tmp_path / f"weights{suffix}")
    assert_same_bits(state, {name: torch.from_numpy(value) for name, value in observed["weights"].items()})
    tiny.Mlp().load_state_dict(state)


@SUFFIXES
def test_averaged_weights_give_the_results_that_the_run_reported(
    run: tuple[Path, dict[str, Any]], tmp_path: Path, suffix: str
) -> None:
    path, observed = run
    model = tiny.Mlp().eval()
    inputs, target = tiny.points(split="validation").tensors
    losses = {}
    for weights in ("raw", "averaged"):
        model.load_state_dict(exported(path, tmp_path / f"{weights}{suffix}", weights=weights))
        losses[weights] = F.cross_entropy(model(inputs), target).item()
    assert losses["averaged"] == pytest.approx(observed["results"]["loss"], rel=1e-10)
    assert losses["raw"] != pytest.approx(losses["averaged"], rel=1e-4)


def test_the_average_is_that_of_the_raw_weights_of_all_steps(run: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    checkpoints = sorted((run[0] / "checkpoints").glob("step-*"))
    raw = [exported(c, tmp_path / f"raw{i}.pt") for i, c in enumerate(checkpoints)]
    averaged = [exported(c, tmp_path / f"averaged{i}.pt", weights="averaged") for i, c in enumerate(checkpoints)]
    for name in ("net.0.weight", "net.4.bias", "net.1.weight"):
        assert torch.equal(averaged[0][name], raw[0][name])
        for before, now, weight in zip(averaged, averaged[1:], raw[1:], strict=False):
            assert torch.allclose(now[name], 0.8 * before[name] + 0.2 * weight[name], rtol=1e-12, atol=0)
    for name in ("net.1.running_mean", "net.1.running_var", "net.1.num_batches_tracked"):
        assert torch.equal(averaged[-1][name], raw[-1][name])


def test_the_file_says_what_it_holds(run: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    warnings: list[str] = []
    for weights in ("raw", "averaged"):
        export(run[0], tmp_path / f"{weights}.safetensors", weights=weights, warn=warnings.append)
        with safe_open(tmp_path / f"{weights}.safetensors", framework="pt") as file:
            told = file.metadata()
        results = json.loads(told.pop("results"))
        assert results == run[1]["results"]
        assert told == {
            "format": "pt",
            "weights": weights,
            "checkpoint": "step-00000005",
            "step": "5",
            "epoch": "1",
            "attempt": "0",
            "run": "moons",
            "results_of": "averaged",
        }
    assert warnings == ["the results of step-00000005 are those of its averaged weights; exported are the raw"]


@SUFFIXES
def test_every_type_and_shape_comes_out_bit_for_bit(tmp_path: Path, suffix: str) -> None:
    generator = torch.Generator().manual_seed(0)
    state = {
        f"{dtype}": torch.randint(0, 2, (3, 5), generator=generator, dtype=torch.uint8).to(dtype) for dtype in DTYPES
    }
    bits = torch.randint(0, 256, (64,), generator=generator, dtype=torch.uint8)
    state["any bits"] = bits.view(torch.float32)
    state["nan"] = torch.tensor([float("nan"), float("inf"), -0.0])
    state["scalar"] = torch.tensor(3)
    state["empty"] = torch.zeros(0, 4)
    state["transposed"] = torch.arange(6.0).reshape(2, 3).t()
    assert_same_bits(exported(written(tmp_path / "c", state), tmp_path / f"weights{suffix}"), state)


@SUFFIXES
@pytest.mark.parametrize("weights", ["raw", "averaged"])
def test_tied_weights_are_under_both_names(tmp_path: Path, suffix: str, weights: str) -> None:
    tied = Tied()
    training_module = TrainingModule(tied, tiny.PairObjective())
    average = WeightAverage(training_module, AveragingSection(decay=0.5))
    for _ in range(2):
        with torch.no_grad():
            for parameter in training_module.parameters():
                parameter.add_(1)
            tied.norm.get_buffer("running_mean").add_(7)
        average.update()
    model = training_module.model.state_dict()
    checkpoint = written(tmp_path / "c", model, averaging=average.state_dict())
    expected = {name: tensor.clone() for name, tensor in model.items()}
    if weights == "averaged":
        with average.swapped_in():
            expected = {name: tensor.clone() for name, tensor in model.items()}
    state = exported(checkpoint, tmp_path / f"weights{suffix}", weights=weights)
    assert_same_bits(state, expected)
    assert torch.equal(state["head.weight"], state["embedding.weight"])
    shared = state["head.weight"].data_ptr() == state["embedding.weight"].data_ptr()
    assert shared == (suffix != ".safetensors")
    Tied().load_state_dict(state)


def test_a_torch_file_holds_no_more_than_its_tensors(tmp_path: Path) -> None:
    big = {"weight": torch.zeros(100_000)}
    temperature = tiny.PairObjective().temperature
    average = {"model.weight": torch.ones(100_000), "objective.temperature": temperature}
    checkpoint = written(tmp_path / "c", big, averaging=kept(average), optimizer={"state": torch.zeros(500_000)})
    for weights in ("raw", "averaged"):
        state = exported(checkpoint, tmp_path / "w.pt", weights=weights, force=True)
        assert list(state) == ["weight"]
        assert (tmp_path / "w.pt").stat().st_size < 402_000


def test_what_is_no_tensor_is_left_out_and_named(tmp_path: Path) -> None:
    warnings: list[str] = []
    checkpoint = written(tmp_path / "c", WithExtraState(2, 1).state_dict())
    export(checkpoint, tmp_path / "w.pt", warn=warnings.append)
    assert list(read(tmp_path / "w.pt")) == ["weight", "bias"]
    assert "_extra_state" in warnings[0]
    WithExtraState(2, 1).load_state_dict(read(tmp_path / "w.pt"), strict=False)


def test_a_checkpoint_without_an_average_is_refused(tmp_path: Path) -> None:
    for name, training in {"never": {}, "not set": {"averaging": None}}.items():
        checkpoint = written(tmp_path / name, {"w": torch.zeros(1)}, **training)
        with pytest.raises(CheckpointError, match="holds no averaged weights"):
            exported(checkpoint, tmp_path / "w.pt", weights="averaged")


def test_an_average_that_does_not_fit_the_names_is_refused(tmp_path: Path) -> None:
    checkpoint = written(tmp_path / "c", {"w": torch.zeros(1)}, averaging=kept({"model.v": torch.ones(1)}))
    with pytest.raises(CheckpointError, match="an average of v"):
        exported(checkpoint, tmp_path / "w.pt", weights="averaged")


def test_of_a_run_the_newest_whole_one_that_counts_is_taken(tmp_path: Path) -> None:
    warnings: list[str] = []
    path = tmp_path / "run" / "checkpoints"
    checkpoints = folder(path)
    for step in (1, 2, 3, 4):
        save(checkpoints, step)
    rolled_back(path, to=3)
    spoil(path / "step-00000003")
    before = on_disk(tmp_path)
    for source in (tmp_path / "run", path):
        done = export(source, tmp_path / "w.pt", force=True, warn=warnings.append)
        assert done.checkpoint == "step-00000002"
        assert torch.equal(read(done.path)["weight"], torch.full((3,), 2.0))
        done.path.unlink()
    assert on_disk(tmp_path) == before
    damaged = "step-00000003 is skipped: it is damaged (model.safetensors does not match its checksum)"
    assert warnings == [damaged] * 2


@pytest.mark.parametrize("file", ["model.safetensors", "training.safetensors", "state.json", "manifest.json"])
def test_a_damaged_checkpoint_is_refused_by_name_and_left_where_it_is(tmp_path: Path, file: str) -> None:
    checkpoints = folder(tmp_path)
    save(checkpoints, 1)
    path = save(checkpoints, 2)
    spoil(path, file)
    before = on_disk(tmp_path)
    with pytest.raises(CheckpointError, match=r"step-00000002 is damaged \(" + file):
        exported(path, tmp_path / "w.pt")
    assert on_disk(tmp_path) == before


def test_a_partial_one_one_of_a_newer_format_and_none_at_all_are_refused(tmp_path: Path) -> None:
    checkpoints = folder(tmp_path / "c")
    path = save(checkpoints, 1)
    partial = path.with_name("step-00000002.partial-abcd")
    partial.mkdir()
    with pytest.raises(CheckpointError, match=r"step-00000002\.partial-abcd is partial"):
        exported(partial, tmp_path / "w.pt")
    manifest = path / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "version": 99}))
    state = manifest.with_name("state.json")
    state.write_text(json.dumps({**json.loads(state.read_text()), "version": 99}))
    for source in (path, tmp_path / "c"):
        with pytest.raises(CheckpointError, match="step-00000001 has format 99"):
            exported(source, tmp_path / "w.pt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no whole checkpoint"):
        exported(tmp_path / "empty", tmp_path / "w.pt")
    assert not (tmp_path / "w.pt").exists()


def test_a_copy_under_another_name_is_a_checkpoint_too(tmp_path: Path) -> None:
    path = save(folder(tmp_path), 1)
    path.rename(tmp_path / "favourite")
    assert torch.equal(exported(tmp_path / "favourite", tmp_path / "w.pt")["weight"], torch.ones(3))


@SUFFIXES
def test_a_file_that_is_there_is_written_over_only_when_told_to(tmp_path: Path, suffix: str) -> None:
    checkpoint, out = save(folder(tmp_path / "c"), 1), tmp_path / f"w{suffix}"
    out.write_text("mine")
    with pytest.raises(CheckpointError, match=r"already exists; .* --force"):
        exported(checkpoint, out)
    assert out.read_text() == "mine"
    assert torch.equal(exported(checkpoint, out, force=True)["weight"], torch.ones(3))


def test_a_file_that_comes_meanwhile_is_not_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, out = save(folder(tmp_path / "c"), 1), tmp_path / "w.pt"
    monkeypatch.setattr(module, "_difference", lambda *states: out.write_text("mine") and None)
    with pytest.raises(CheckpointError, match="already exists"):
        exported(checkpoint, out)
    assert out.read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "w.pt"]


def test_impossible_targets_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    checkpoint = save(folder(tmp_path / "c"), 1)
    before = on_disk(tmp_path)
    with pytest.raises(ConfigurationError, match=r"w\.bin must end in \.safetensors"):
        exported(checkpoint, tmp_path / "w.bin")
    with pytest.raises(CheckpointError, match=r"there is no folder .*missing"):
        exported(checkpoint, tmp_path / "missing" / "w.pt")
    with pytest.raises(CheckpointError, match="is inside a checkpoint"):
        exported(checkpoint, checkpoint / "model.safetensors", force=True)
    assert on_disk(tmp_path) == before
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(CheckpointError, match="it is a folder"):
        exported(checkpoint, tmp_path / "folder.pt", force=True)


@SUFFIXES
@pytest.mark.parametrize("there", [False, True])
def test_a_disk_that_takes_no_more_leaves_what_was_there(tmp_path: Path, suffix: str, there: bool) -> None:
    checkpoint, out = written(tmp_path / "c", {"w": torch.ones(300_000)}), tmp_path / f"w{suffix}"
    if there:
        out.write_text("mine")
    before = on_disk(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=rf"w{suffix} could not be written: .*File too large"):
            exported(checkpoint, out, force=there)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert on_disk(tmp_path) == before


@pytest.mark.parametrize(("suffix", "there"), [(".safetensors", True), (".safetensors", False), (".pt", False)])
def test_a_killed_export_leaves_no_half_file_and_the_next_one_clears_up(
    tmp_path: Path, suffix: str, there: bool
) -> None:
    checkpoint, out = save(folder(tmp_path / "c"), 1), tmp_path / f"w{suffix}"
    if there:
        out.write_text("mine")
    code = (
        "import os, sys, signal\nfrom pathlib import Path\nfrom runtime.commands import weights_file\n"
        "weights_file._difference = lambda *states: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"weights_file.export(Path({str(checkpoint)!r}), Path({str(out)!r}), force=True, warn=print)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    left = sorted(p.name for p in tmp_path.iterdir() if p.name.startswith("."))
    assert len(left) == 1
    assert (out.read_text() == "mine") if there else not out.exists()
    alive = tmp_path / left[0].replace(left[0].rpartition("-")[2], str(os.getppid()))
    alive.mkdir()  # of an export that is running
    assert torch.equal(exported(checkpoint, out, force=True)["weight"], torch.ones(3))
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([alive.name, "c", out.name])


@SUFFIXES
def test_what_reads_back_otherwise_is_not_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    """The disk changes one bit of a value after it was written."""
    checkpoint, out = written(tmp_path / "c", {"w": torch.full((64,), 1.5)}), tmp_path / f"w{suffix}"
    value, fsync = torch.tensor(1.5).numpy().tobytes(), os.fsync

    def damaging(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").resolve()
        if path.suffix == suffix:
            content = bytearray(path.read_bytes())
            content[content.rindex(value * 60)] ^= 1
            path.write_bytes(content)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", damaging)
    with pytest.raises(CheckpointError, match=r"was not written: w has other values|could not be written: .*crc"):
        exported(checkpoint, out)
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize(
    ("back", "difference"),
    [
        ({}, r"the names differ \(a\)"),
        ({"a": torch.zeros(2), "b": torch.zeros(2)}, r"the names differ \(b\)"),
        ({"a": torch.zeros(2, 1)}, "a has another shape or dtype"),
        ({"a": torch.zeros(2, dtype=torch.int32)}, "a has another shape or dtype"),
        ({"a": torch.tensor([0.0, -0.0])}, "a has other values"),
    ],
)
def test_a_difference_of_any_kind_stops_an_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, back: dict[str, Tensor], difference: str
) -> None:
    checkpoint = written(tmp_path / "c", {"a": torch.zeros(2)})
    monkeypatch.setattr(module, "_read", lambda path: back)
    with pytest.raises(CheckpointError, match=difference):
        exported(checkpoint, tmp_path / "w.pt")
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_a_checkpoint_that_a_run_removes_meanwhile_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = save(folder(tmp_path / "c"), 1)
    monkeypatch.setattr(module, "damage_of", lambda path: path.rename(path.with_name("gone")) and None)
    with pytest.raises(CheckpointError, match="step-00000001 was removed by its run while it was read"):
        exported(checkpoint, tmp_path / "w.pt")


@SUFFIXES
def test_others_may_read_the_file_as_any_other(tmp_path: Path, suffix: str) -> None:
    umask = os.umask(0o022)
    try:
        exported(save(folder(tmp_path / "c"), 1), tmp_path / f"w{suffix}")
    finally:
        os.umask(umask)
    assert (tmp_path / f"w{suffix}").stat().st_mode & 0o777 == 0o644


def test_the_command_prints_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tied = torch.zeros(4, 2)
    state = {"a": tied, "b": tied, "c": torch.zeros(3)}
    written(tmp_path / "run" / "checkpoints", state)
    out = tmp_path / "w.safetensors"
    assert main(["export", str(tmp_path / "run"), str(out)]) == 0
    told = capsys.readouterr()
    size = f"{out.stat().st_size:,} bytes"
    names = "3 names, 11 parameters and buffer values"
    assert told.out == f"exported raw weights of step-00000003: {names}, {size}, {out}\n"
    assert told.err == ""
    assert main(["export", str(tmp_path / "run"), str(out)]) == 1
    assert capsys.readouterr().err.startswith(f"lockstep: {out} already exists")
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "w.txt")]) == 2
