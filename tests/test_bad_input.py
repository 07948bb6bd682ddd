"""Whatever is wrong is told in one message, with its exit code, and costs nothing of what is on disk."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

import launch.local
from runtime import cli
from runtime.checkpoints.checkpoint import CheckpointFolder
from runtime.config.file import load
from runtime.errors import CheckpointError, LockstepError
from runtime.launched import run
from runtime.run.result import RunResult
from runtime.session import train
from tests.process_pool import ProcessPool

launched_train = partial(run, "train")

PARTS = '''\
"""A user's modules: some that work, and many that do not."""

import os
import signal
import time

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from runtime.objective import Loss, Objective

made = []


class Net(nn.Linear):
    def __init__(self, outputs=3):
        super().__init__(8, outputs, dtype=torch.float64)
        made.append(self)


class Points(Dataset):
    """64 samples; with ``nan`` one of them is not a number."""

    def __init__(self, size=64, nan=None, seed=0, label=None):
        generator = torch.Generator().manual_seed(seed)
        self.inputs = torch.randn(size, 8, generator=generator, dtype=torch.float64)
        self.target = torch.arange(size) % 3
        if nan is not None:
            self.inputs[nan] = float("nan")

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        time.sleep(float(os.environ.get("SAMPLE_SECONDS", 0)))
        return self.inputs[index], self.target[index]


class Raising(Points):
    def __getitem__(self, index):
        if index == 37:
            raise OSError("this sample cannot be read")  # line 44
        return super().__getitem__(index)


class MissingFile(Points):
    def __getitem__(self, index):
        return np.load("nowhere.npy")  # line 50


class Killed(Points):
    def __getitem__(self, index):
        if index == 37 and torch.multiprocessing.parent_process() is not None:  # in a loader worker
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


class Three(Points):
    def __getitem__(self, index):
        return (*super().__getitem__(index), 0)


class InputsOnly(Points):
    def __getitem__(self, index):
        return self.inputs[index]


def from_file(path="nowhere.csv"):
    return open(path)  # line 71


def noise(sample):
    return sample


def tensors():
    points = Points()
    return TensorDataset(points.inputs, points.target)


def never(samples):
    raise ValueError("never called")


class Scaled:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, sample):
        return sample[0] * self.factor, sample[1]


class Returns(Objective):
    """Returns whatever it is told to."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, model, batch):
        losses = (model(batch[0]) - 1).square()
        return {
            "vector": losses,
            "one element": losses.sum().reshape(1),
            "number": 3.0,
            "nothing": None,
            "loss of a number": Loss(3.0),
            "no gradient": losses.sum().detach(),
        }[self.kind]
'''
PARTS_NAME = "bad_input_parts"

single = pytest.mark.single  # the others need the pool


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A code folder; what it adds to this process is taken back."""
    folder = tmp_path_factory.mktemp("code")
    (folder / f"{PARTS_NAME}.py").write_text(PARTS)
    path = list(sys.path)
    yield folder
    sys.path[:] = path
    sys.modules.pop(PARTS_NAME, None)


def section(target: str, **args: Any) -> dict[str, Any]:
    return {"target": f"{PARTS_NAME}:{target}", "args": args}


def written(code: Path, folder: Path) -> Path:
    """Write the YAML file of a run that works, of 4 steps an epoch."""
    values = {
        "code": str(code),
        "output": str(folder / "run"),
        "model": section("Net"),
        "data": {"train": section("Points"), "validation": section("Points", size=5), "shuffle": False},
        "batch": {"global_size": 16, "slots": 3},
        "objective": "CrossEntropyLoss",
        "optimizer": {"target": "SGD", "args": {"lr": 0.1}},
        "limit": {"steps": 4},
        "checkpoint": {"every": "1 step", "keep": 3},
        "reporting": {"every": "1 step"},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def config(code: Path, tmp_path: Path) -> Path:
    """The YAML file of the working run."""
    return written(code, tmp_path)


@pytest.fixture(scope="module")
def four_steps(code: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """The final weights of the working run."""
    return final_weights(train(written(code, tmp_path_factory.mktemp("four_steps"))))


@pytest.fixture(scope="module")
def two_steps(code: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the working run after two steps."""
    folder = tmp_path_factory.mktemp("two_steps")
    return train(written(code, folder), "limit.steps=2").folder


Told = Callable[..., str]


@pytest.fixture
def told(capfd: pytest.CaptureFixture[str]) -> Told:
    """Run one command, and return the one message it wrote to stderr."""

    def told(command: Callable[[list[str]], int], config: Path, *overrides: str, code: int) -> str:
        capfd.readouterr()
        before = [str(config), *overrides] if command is launched_train else ["train", str(config), *overrides]
        assert command(before) == code
        out, err = capfd.readouterr()
        return the_message(err, out)

    return told


def the_message(err: str, out: str = "") -> str:
    assert "Traceback" not in err + out
    assert err.startswith("lockstep: "), err
    assert err.count("lockstep: ") == 1, err
    return err.removeprefix("lockstep: ").rstrip("\n")


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file but the locks, of which each start leaves one."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith("fence-"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def records(folder: Path, event: str) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["event"] == event]


def final_weights(result: RunResult) -> dict[str, list[Any]]:
    return {name: tensor.tolist() for name, tensor in result.model.state_dict().items()}


def yaml_of(value: Any) -> str:
    return json.dumps(value)


def was_started(*args: Any, **kwargs: Any) -> int:
    pytest.fail("the run was started")


# Mistakes that are found before anything is started


@single
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["sede=1"], ["command line sede:", "did you mean 'seed'?"]),
        (["batch.global_size=many"], ["batch.global_size:", "integer", "'many'"]),
        (["reporting.progress=no"], ["reporting.progress:", "true or false", "no is text"]),
        (["limit.epochs=1"], ["config.yaml:", "limit:", "either 'epochs' or 'steps'"]),
        (["model=nowhere:Net"], ["model.target:", "cannot import 'nowhere'"]),
        ([f"model={PARTS_NAME}:Nett"], ["model.target:", "did you mean 'Net'?"]),
        (["model.args.ouputs=3"], ["model.args.ouputs:", "Net has no argument 'ouputs'; did you mean 'outputs'?"]),
        (["optimizer={target: AdamW, args: {beta: [0.9, 0.99]}}"],
         ["optimizer.args.beta:", "AdamW has no argument 'beta'; did you mean 'betas'?"]),
        (["optimizer.groups=[{match: ['*'], args: {weight_decai: 0}}]"],
         ["optimizer.groups.0.args.weight_decai:", "did you mean 'weight_decay'?"]),
        (["objective=CrossEntropyLos"], ["objective.target:", "did you mean 'CrossEntropyLoss'?"]),
        (["schedule={target: StepLR}"], ["schedule.args:", "StepLR needs the argument 'step_size'"]),
        (["data.test=nowhere:Points"], ["data.test.target:", "cannot import 'nowhere'"]),
        ([f"data.train.transform={PARTS_NAME}:nois"], ["data.train.transform.target:", "did you mean 'noise'?"]),
        ([f"data.collate={PARTS_NAME}:nois"], ["data.collate.target:", "did you mean 'noise'?"]),
        ([f"data.train.transform={{target: {PARTS_NAME}:Scaled, args: {{facter: 2}}}}"],
         ["data.train.transform.args.facter:", "did you mean 'factor'?"]),
        ([f"data.train.transform={PARTS_NAME}:Scaled"], ["data.train.transform", "'factor'"]),
        ([f"data.collate={{target: {PARTS_NAME}:Scaled, args: {{facter: 2}}}}"], ["data.collate.args.facter:"]),
        (["data.shuffle=true", "data.sampler=RandomSampler"], ["data.shuffle:", "leave 'shuffle' out"]),
    ],
)  # fmt: skip
def test_a_mistake_in_the_configuration_starts_nothing_and_leaves_nothing(
    config: Path, told: Told, monkeypatch: pytest.MonkeyPatch, overrides: list[str], words: list[str]
) -> None:
    monkeypatch.setattr(launch.local, "train_locally", was_started)
    messages = {told(command, config, *overrides, code=2) for command in (cli.main, launched_train)}
    (message,) = messages
    for word in words:
        assert word in message
    assert not (config.parent / "run").exists()


@single
def test_an_argument_that_a_sampler_lacks_is_told_before_anything_is_started(
    config: Path, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch.local, "train_locally", was_started)
    text = config.read_text().replace("  shuffle: false\n", "")
    config.write_text(text)
    message = told(cli.main, config, "data.sampler={target: RandomSampler, args: {num_sample: 9}}", code=2)
    assert "data.sampler.args.num_sample:" in message
    assert "did you mean 'num_samples'?" in message


@single
def test_keys_that_are_unknown_written_twice_or_of_the_wrong_type_are_told_with_their_lines(
    config: Path, told: Told
) -> None:
    lines = config.read_text().count("\n")
    config.write_text(config.read_text() + "sede: 1\nseed: x\n")
    message = told(cli.main, config, code=2)
    assert f"config.yaml:{lines + 1} sede:" in message
    assert f"config.yaml:{lines + 2} seed:" in message
    config.write_text(config.read_text() + "sede: 2\n")
    message = told(cli.main, config, code=2)
    assert f"config.yaml:{lines + 3} sede: written twice; first in line {lines + 1}" in message


@single
def test_a_missing_file_is_named(tmp_path: Path, told: Told) -> None:
    for command in (cli.main, launched_train):
        message = told(command, tmp_path / "missing.yaml", code=2)
        assert message == f"{tmp_path / 'missing.yaml'}: cannot be read: No such file or directory"


@single
def test_wandb_that_is_not_installed_is_told_with_how_to_install_it(
    config: Path, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # how Python itself marks a module as not there
    monkeypatch.setattr(launch.local, "train_locally", was_started)
    for command in (cli.main, launched_train):
        message = told(command, config, "reporting.wandb=true", code=2)
        assert "reporting.wandb" in message
        assert "pip install 'lockstep-train[wandb]'" in message
    assert not (config.parent / "run").exists()
    assert launched_train([str(config), "reporting.wandb=false", "limit.steps=1"]) == 0


@single
def test_exponent_notation_is_a_number_and_text_in_its_place_is_told(config: Path, told: Told) -> None:
    assert launched_train([str(config), "optimizer.args.lr=3e-4", "limit.steps=1"]) == 0
    assert records(config.parent / "run", "train")[0]["learning_rate"] == 0.0003
    message = told(launched_train, config, "optimizer.args.lr='3e-4'", "resume.allow_changes=[optimizer]", code=2)
    assert "optimizer.args" in message
    assert "SGD" in message


# Mistakes that show once the run's parts are built, or in the middle of it


@single
@pytest.mark.parametrize(
    ("overrides", "exit_code", "words"),
    [
        (["data.train.args.size=0"], 1, ["data.train", "empty"]),
        (["data.validation.args.size=0"], 1, ["data.validation", "empty"]),
        ([f"data.train={PARTS_NAME}:from_file"], 2, ["data.train", "FileNotFoundError", f"{PARTS_NAME}.py:71"]),
        (["data.train={target: math:sqrt, args: {}}"], 2, ["data.train", "sqrt"]),
        (["model={target: builtins:dict}"], 2, ["model.target", "dict", "torch.nn.Module"]),
        ([f"data.train={PARTS_NAME}:Raising"], 1,
         ["sample 37", "OSError: this sample cannot be read", f"{PARTS_NAME}.py:44"]),
        ([f"data.train={PARTS_NAME}:Raising", "data.loader.num_workers=1"], 1,
         ["sample 37", "OSError: this sample cannot be read", f"{PARTS_NAME}.py:44"]),
        ([f"data.train={PARTS_NAME}:MissingFile"], 1, ["sample 32", "nowhere.npy", f"{PARTS_NAME}.py:50"]),
        ([f"data.train={PARTS_NAME}:Killed", "data.loader.num_workers=1"], 1,
         ["loader worker", "killed", "data.loader.num_workers"]),
        ([f"data.train={PARTS_NAME}:Three"], 1, ["batch", "(inputs, target)", "of 3"]),
        ([f"data.train={PARTS_NAME}:InputsOnly"], 1, ["batch", "(inputs, target)", "tensor of shape (5, 8)"]),
        (["objective=MSELoss"], 1, ["MSELoss", "(5,)", "(5, 3)"]),
        *((["objective=" + yaml_of(section("Returns", kind=kind))], 1, ["Returns", "sum", *words])
          for kind, words in [("vector", ["(5, 3)"]), ("one element", ["(1,)"]), ("number", ["float"]),
                              ("nothing", ["NoneType"]), ("loss of a number", ["float"]),
                              ("no gradient", ["gradient"])]),
        (["optimizer.groups=[{match: ['*.bias']}]"], 2, ["optimizer.groups", "'*.bias'"]),
        (["optimizer={target: Adam, args: {lr: -1}}"], 2, ["optimizer", "Invalid learning rate: -1"]),
    ],
)  # fmt: skip
def test_what_goes_wrong_in_a_run_is_one_message_and_costs_no_checkpoint(
    config: Path, told: Told, two_steps: Path, overrides: list[str], exit_code: int, words: list[str]
) -> None:
    run = config.parent / "run"
    shutil.copytree(two_steps, run)
    sections = sorted({override.partition("=")[0].partition(".")[0] for override in overrides})
    message = told(launched_train, config, *overrides, f"resume.allow_changes=[{','.join(sections)}]", code=exit_code)
    for word in words:
        assert word in message
    before, after = contents(two_steps / "checkpoints"), contents(run / "checkpoints")
    assert after == before
    assert [record["step"] for record in records(run, "train")] == [1, 2]


@single
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.args.outputs=2"], ["CrossEntropyLoss", "Target 2 is out of bounds"]),
        (["objective={target: CrossEntropyLoss, args: {weight: [1.0, 2.0]}}"], ["CrossEntropyLoss"]),
    ],
)
def test_a_model_whose_output_does_not_fit_the_loss_is_one_message(
    config: Path, told: Told, overrides: list[str], words: list[str]
) -> None:
    message = told(launched_train, config, *overrides, code=1)
    for word in words:
        assert word in message


@single
def test_an_empty_test_set_is_told_before_the_first_step(config: Path, told: Told) -> None:
    message = told(launched_train, config, "data.test=" + yaml_of(section("Points", size=0)), code=1)
    assert "data.test" in message
    assert not (config.parent / "run" / "checkpoints").exists()


@single
def test_a_test_set_that_failed_after_training_is_evaluated_when_the_run_is_started_again(
    config: Path, told: Told
) -> None:
    failing = "data.test=" + yaml_of(section("Raising"))
    assert "sample 37" in told(launched_train, config, failing, code=1)
    mended = "data.test=" + yaml_of(section("Points"))
    results = train(config, mended, "resume.allow_changes=[data.test]").results
    assert results["test/samples"] == 64


@single
def test_a_collate_function_is_called_or_refused_but_never_ignored(config: Path, told: Told) -> None:
    """A TensorDataset is read a whole slot at a time, without samples to collate."""
    options = [f"data.collate={PARTS_NAME}:never", "data.validation=null"]
    assert "never called" in told(launched_train, config, *options, code=1)
    assert launched_train([str(config), *options, f"data.train={PARTS_NAME}:tensors"]) != 0


@single
def test_a_loss_that_is_not_a_number_changes_neither_parameters_nor_checkpoints(
    config: Path, told: Told, two_steps: Path
) -> None:
    run = config.parent / "run"
    shutil.copytree(two_steps, run)
    # Unshuffled, the third step has samples 32 to 47.
    message = told(launched_train, config, "data.train.args.nan=40", "resume.allow_changes=[data]", code=1)
    assert message.startswith("step 3 (epoch 1, batch 3): the gradient is NaN or infinite")
    assert contents(run / "checkpoints") == contents(two_steps / "checkpoints")
    stored = load_file(two_steps / "checkpoints" / "step-00000002" / "model.safetensors")
    model = sys.modules[PARTS_NAME].made[-1]
    assert {name: p.tolist() for name, p in model.named_parameters()} == {n: t.tolist() for n, t in stored.items()}
    # What the message promises: the same command goes on from the last checkpoint, once the data is mended.
    assert launched_train([str(config)]) == 0
    assert [record["step"] for record in records(run, "train")] == [1, 2, 3, 4]


# The run folder


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """As on a full disk, writing fails in the middle of a file: with EFBIG, for any file above so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@single
def test_a_checkpoint_that_does_not_fit_on_the_disk_leaves_the_earlier_ones_whole(
    config: Path, told: Told, two_steps: Path
) -> None:
    run = config.parent / "run"
    shutil.copytree(two_steps, run)
    state = (run / "checkpoints" / "step-00000002" / "state.json").stat().st_size
    assert (run / "config.yaml").stat().st_size < state
    with no_file_above(state - 100):
        message = told(launched_train, config, code=1)
    assert message.startswith("step 3 could not be saved to")
    assert "File too large" in message
    assert "earlier checkpoints are whole" in message
    assert contents(run / "checkpoints") == contents(two_steps / "checkpoints")
    assert launched_train([str(config)]) == 0


@single
@pytest.mark.parametrize("failing", range(1, 8))
def test_a_disk_that_is_full_when_a_file_is_synced_costs_no_earlier_checkpoint(
    config: Path, told: Told, two_steps: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """The file system may only find out at ``fsync``; config.yaml, four files, two folders are synced for a step."""
    run = config.parent / "run"
    shutil.copytree(two_steps, run)
    (run / "metrics.jsonl").unlink()
    synced = []
    fsync = os.fsync

    def full(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) == failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr("runtime.state.durable_files.os.fsync", full)
    message = told(launched_train, config, "limit.steps=3", code=1)
    monkeypatch.undo()
    assert "No space left on device" in message
    before, after = contents(two_steps / "checkpoints"), contents(run / "checkpoints")
    assert {name: after[name] for name in before} == before
    added = {name.split("/")[0] for name in set(after) - set(before)}
    assert added <= {"step-00000003"}  # no partial folder
    assert [path.name for path in run.iterdir() if path.name.startswith(".")] == []


@single
def test_a_disk_that_is_full_for_figures_alone_does_not_end_the_run(config: Path) -> None:
    run = config.parent / "run"
    with no_file_above(16_000):
        result = train(config, "limit.steps=80", "checkpoint.every=80 steps", "evaluation.every=80 steps")
    assert (run / "metrics.jsonl").stat().st_size == 16_000  # it did fill up
    assert (result.outcome, result.step) == ("finished", 80)


@single
def test_a_run_folder_that_cannot_be_made_is_told(config: Path, told: Told) -> None:
    (config.parent / "file").touch()
    for output in ("file", "file/run"):
        message = told(launched_train, config, f"output={config.parent / output}", code=1)
        assert str(config.parent / output) in message
        assert "cannot create the run folder" in message


@single
def test_a_run_folder_of_another_configuration_is_refused_with_old_and_new_values(
    config: Path, told: Told, two_steps: Path
) -> None:
    run = config.parent / "run"
    shutil.copytree(two_steps, run)
    before = contents(run)
    message = told(
        launched_train, config, "optimizer.args.lr=0.2", "seed=7", "data.train.args.size=60", "limit.steps=9", code=1
    )
    assert str(run) in message
    assert "optimizer.args.lr: was 0.1, is 0.2" in message
    assert "seed: was 0, is 7" in message
    assert "data.train.args.size" in message
    assert "limit" not in message
    assert "resume.allow_changes" in message
    after = contents(run)
    assert {**after, "outcome.json": b""} == {**before, "outcome.json": b""}
    assert train(config, "optimizer.args.lr=0.2", "resume.allow_changes=[optimizer.args.lr]").step == 4


@single
def test_an_allowed_change_that_the_checkpoint_cannot_follow_is_told(config: Path, told: Told, two_steps: Path) -> None:
    run = config.parent / "run"
    for change in ("model.args.outputs=4", "optimizer={target: AdamW, args: {lr: 0.1}}"):
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(two_steps, run)
        message = told(launched_train, config, change, "resume.allow_changes=[model, optimizer]", code=1)
        assert "the checkpoint does not fit" in message
        assert contents(run / "checkpoints") == contents(two_steps / "checkpoints")


@single
def test_a_run_must_or_must_not_find_a_checkpoint_if_it_is_told_so(config: Path, told: Told, two_steps: Path) -> None:
    run = config.parent / "run"
    message = told(launched_train, config, "resume=must", code=1)
    assert str(run) in message
    assert "holds no checkpoint" in message
    shutil.rmtree(run)
    shutil.copytree(two_steps, run)
    message = told(launched_train, config, "resume=never", code=1)
    assert str(run) in message
    assert "holds a checkpoint" in message
    assert contents(run / "checkpoints") == contents(two_steps / "checkpoints")
    assert train(config, "resume=must").step == 4


@single
@pytest.mark.parametrize("damaged", ["model.safetensors", "training.safetensors", "state.json", "manifest.json"])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_taken(
    config: Path, two_steps: Path, four_steps: dict[str, list[Any]], capfd: pytest.CaptureFixture[str], damaged: str
) -> None:
    run = config.parent / "run"
    shutil.copytree(two_steps, run)
    path = run / "checkpoints" / "step-00000002" / damaged
    damage = bytearray(path.read_bytes())
    damage[-4] ^= 1
    path.write_bytes(damage)
    capfd.readouterr()
    again = train(config)
    out, err = capfd.readouterr()
    assert "step-00000002 is damaged" in out + err
    assert "resumed after step 1" in out
    assert final_weights(again) == four_steps
    kept = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert kept[:1] + kept[2:] == ["step-00000002", "step-00000003", "step-00000004"]
    assert kept[1].startswith("step-00000002.damaged-")


@single
def test_no_flipped_bit_in_a_manifest_ends_a_run(two_steps: Path, tmp_path: Path) -> None:
    """Whatever is flipped, the checkpoint before is taken, unless the format's own number seems newer."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_steps / "checkpoints", folder)
    newest = folder / "step-00000002"
    manifest = (newest / "manifest.json").read_bytes()
    found = set()
    for position in range(len(manifest)):
        for bit in (0, 3, 6):
            flipped = bytearray(manifest)
            flipped[position] ^= 1 << bit
            (newest / "manifest.json").write_bytes(flipped)
            checkpoints = CheckpointFolder(folder, keep=3, best=[], warn=lambda text: None)
            try:
                taken = checkpoints.newest()
            except CheckpointError as error:
                found.add("newer" if "update it" in str(error) else str(error))
            else:
                assert taken is not None
                found.add(taken.path.name)
            for aside in folder.glob("*.damaged-*"):
                aside.rename(newest)
    assert found <= {"step-00000001", "step-00000002", "newer"}


@single
@pytest.mark.parametrize(
    "text", ["", "[]", "null", "3", '{"version": "x", "files": {}}', '{"version": 1, "files": []}']
)
def test_a_manifest_that_holds_something_else_counts_as_damaged(two_steps: Path, tmp_path: Path, text: str) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_steps / "checkpoints", folder)
    (folder / "step-00000002" / "manifest.json").write_text(text)
    warnings: list[str] = []
    taken = CheckpointFolder(folder, keep=3, best=[], warn=warnings.append).newest()
    assert taken is not None
    assert taken.step == 1
    assert "step-00000002 is damaged" in warnings[0]


@single
def test_a_checkpoint_of_a_newer_format_is_refused_and_kept(config: Path, told: Told, two_steps: Path) -> None:
    run = config.parent / "run"
    shutil.copytree(two_steps, run)
    path = run / "checkpoints" / "step-00000002" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 3}))
    state = path.with_name("state.json")
    state.write_text(json.dumps({**json.loads(state.read_text()), "version": 3}))
    before = contents(run / "checkpoints")
    message = told(launched_train, config, code=1)
    assert "step-00000002" in message
    assert "format 3" in message
    assert contents(run / "checkpoints") == before


@single
def test_the_configuration_in_the_run_folder_loads_to_the_same_values(config: Path) -> None:
    label = json.dumps(["1e5", "3e-4", "no", "010", "0o10", "1:30", "2024-01-01", "", "=", "~", "true", "é"])
    loaded = load(config, [f"data.train.args.label={label}", "limit.steps=1"])
    train(config, f"data.train.args.label={label}", "limit.steps=1")
    written = load(config.parent / "run" / "config.yaml")
    assert written.values.data == loaded.values.data
    assert written.resolved() == {**loaded.resolved(), "code": str(loaded.code)}


@single
def test_values_that_equal_nothing_not_even_themselves_do_not_keep_a_run_from_resuming(config: Path) -> None:
    label = "data.train.args.label=[.nan, .inf, {0: zero}]"
    assert train(config, label, "limit.steps=1").step == 1
    assert train(config, label, "limit.steps=2").step == 2


# Several processes


def attempt(config: Path, *overrides: str) -> tuple[str, Any]:
    """What became of a run on this rank: the error's exit code and message, or the results."""
    try:
        return "results", dict(train(config, *overrides).results)
    except LockstepError as error:
        return type(error).__name__, (error.exit_code, str(error))


def test_a_global_batch_smaller_than_the_world_is_told_on_every_rank(config: Path, pool: ProcessPool) -> None:
    told = pool.run(attempt, 2, config, "batch={global_size: 1}")
    assert told[0] == told[1]
    kind, (code, message) = told[0]
    assert (kind, code) == ("ConfigurationError", 2)
    assert "batch.global_size: 1 samples cannot keep 2 processes busy" in message
    assert pool.run(attempt, 2, config, "batch={global_size: 2}", "limit.steps=1")[1][0] == "results"


def test_fewer_validation_samples_than_ranks_are_evaluated_each_once(config: Path, pool: ProcessPool) -> None:
    options = ("data.validation.args.size=2", "evaluation.micro_size=1", "reporting.progress=false")
    alone = train(config, *options, f"output={config.parent / 'alone'}").results
    for kind, results in pool.run(attempt, 3, config, *options):
        assert kind == "results"
        assert results["samples"] == 2
        assert results["loss"] == pytest.approx(alone["loss"], rel=1e-10)


# The real command


def command(config: Path, *overrides: str, **added: str) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "runtime.cli", "train", str(config), *overrides, "--processes", "1"]
    environment = {**os.environ, **added}
    return subprocess.Popen(
        line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


@dataclass(frozen=True)
class Launched:
    """What came of a real command: its file, exit code, stdout, and stderr after the line that says what is launched."""

    config: Path
    exit_code: int
    out: str
    err: str


def ended(process: subprocess.Popen[str], config: Path) -> Launched:
    out, err = process.communicate(timeout=300)
    launch, _, rest = err.partition("\n")
    assert "accelerate" in launch
    return Launched(config, process.returncode, out, rest)


@pytest.fixture(scope="module")
def launched(code: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Launched]:
    """Two commands at once: one that is told to stop after its first step, long before its end, and one that fails."""
    configs = {name: written(code, tmp_path_factory.mktemp(name)) for name in ("interrupted", "failed")}
    interrupted = command(configs["interrupted"], "limit.steps=100000", SAMPLE_SECONDS="0.01")
    failed = command(configs["failed"], "data.train.args.nan=3")
    figures = configs["interrupted"].parent / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (figures.exists() and '"event": "train"' in figures.read_text()) and interrupted.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    interrupted.send_signal(signal.SIGINT)
    return {
        "interrupted": ended(interrupted, configs["interrupted"]),
        "failed": ended(failed, configs["failed"]),
    }


def test_control_c_exits_75_and_the_same_command_reaches_the_same_end(launched: dict[str, Launched]) -> None:
    stopped = launched["interrupted"]
    assert stopped.exit_code == 75
    assert "the same command resumes the run" in stopped.out
    folder = stopped.config.parent / "run"
    stopped_at = len(records(folder, "train"))
    assert stopped_at >= 1
    limit = f"limit.steps={stopped_at + 5}"
    resumed = train(stopped.config, limit)
    uninterrupted = train(stopped.config, limit, f"output={folder.parent / 'uninterrupted'}")
    assert resumed.step == uninterrupted.step == stopped_at + 5
    assert final_weights(resumed) == final_weights(uninterrupted)
    losses = [[r["loss"] for r in records(result.folder, "train")] for result in (resumed, uninterrupted)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == stopped_at + 5


def test_control_c_shows_no_traceback(launched: dict[str, Launched]) -> None:
    assert launched["interrupted"].err == ""


def test_a_run_that_fails_is_one_message_of_the_command(launched: dict[str, Launched]) -> None:
    failed = launched["failed"]
    assert failed.exit_code == 1
    assert the_message(failed.err, failed.out).startswith("step 1 (epoch 1, batch 1): the gradient is NaN")
