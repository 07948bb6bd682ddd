"""Other ways to say the same: shorthands, Python values, flags, keys in the run folder's name; and what `describe` lists."""

from __future__ import annotations

import datetime
import enum
import json
import math
import sys
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from runtime import cli, launched
from runtime.arguments import parsed, with_flags_as_overrides
from runtime.build.components import check_components
from runtime.config.file import load, load_run
from runtime.errors import ConfigurationError
from runtime.session import train

BASE: dict[str, Any] = {
    "model": {"target": "torch.nn.Linear", "args": {"in_features": 6, "out_features": 4}},
    "data": {"train": "tests.test_additivity:points"},
    "batch": {"global_size": 16},
    "objective": "CrossEntropyLoss",
    "optimizer": {"target": "torch.optim.SGD", "args": {"lr": 0.01}},
    "limit": {"steps": 1},
}


def refused(source: Any, *overrides: str) -> str:
    with pytest.raises(ConfigurationError) as caught:
        load(source, overrides)
    return str(caught.value)


def written(folder: Path, **changes: Any) -> Path:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({**BASE, "output": str(folder / "out"), **changes}))
    return path


# Values of Python


class Kind(enum.Enum):
    LARGE = "large"


class Level(enum.IntEnum):
    TWO = 2


@pytest.mark.parametrize(
    ("value", "read"),
    [
        *((text, float(text)) for text in ("3e-3", "1E5", "1e+3", "-2e4", "1.5e5", ".5e3")),
        ("0o17", 15),
        # what PyYAML reads as text since it was quoted, or is text in YAML 1.2 as well
        *((text, text) for text in ("1", "0.001", "1.5e-3", "true", "e5", "3e-3 ", "0x1f", "1e", "12e5b", "")),
        (np.float32(0.5), 0.5),
        (np.float64(0.1), 0.1),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (np.str_("x"), "x"),
        (Path("a") / "b", "a/b"),
        ((0.9, 0.99), [0.9, 0.99]),
        (range(3), [0, 1, 2]),
        (torch.Size([2, 3]), [2, 3]),
        (Kind.LARGE, "large"),
        (Level.TWO, 2),
        (datetime.date(2026, 1, 31), "2026-01-31"),
        (OrderedDict(a=(1, np.int32(2)), b={"c": ["1e-8", {"d": Path("x")}]}), {"a": [1, 2], "b": {"c": [1e-8, {"d": "x"}]}}),
    ],
    ids=repr,
)  # fmt: skip
def test_a_value_in_a_mapping_is_read_as_in_a_file(value: Any, read: Any) -> None:
    args = load({**BASE, "model": {"target": "M", "args": {"value": value, "deep": [{"er": value}]}}}).values.model.args
    assert args == {"value": read, "deep": [{"er": read}]}
    assert json.loads(json.dumps(args)) == args
    assert type(args["value"]) is type(read)


@pytest.mark.parametrize(
    "text", ["lr: 3e-3", "lr: 1e5", "lr: [1e-3, {a: 2e4}]", "lr: 0o17", "lr: 1.5e5", "lr: 2026-01-31"]
)
def test_what_pyyaml_reads_is_read_as_our_own_reader_does(tmp_path: Path, text: str) -> None:
    path = written(tmp_path)
    path.write_text(path.read_text().replace("lr: 0.01", text))
    assert load(yaml.safe_load(path.read_text())).values.optimizer.args == load(path).values.optimizer.args


def test_typed_keys_take_numbers_of_numpy_and_text_that_looks_like_a_number_stays_text() -> None:
    values = load({**BASE, "batch": {"global_size": np.int64(8)}, "limit": {"epochs": Level.TWO}, "name": "1e5",
                   "averaging": {"decay": "9e-1"}, "evaluation": {"metrics": ["MeanSquaredError"], "class_names": ["1e5", "x"]},
                   "prediction": {"labels": ["1e5", 2]}}).values  # fmt: skip
    assert (values.batch.global_size, values.limit.epochs, values.name) == (8, 2, "1e5")
    assert values.averaging is not None
    assert values.averaging.decay == 0.9
    assert values.evaluation.class_names == ["1e5", "x"]
    assert values.prediction.labels == ["1e5", 2]


@pytest.mark.parametrize(
    "value",
    [object(), {1, 2}, b"x", np.zeros(2), torch.zeros(1), math.sqrt, torch.float32],
    ids=lambda v: type(v).__name__,
)
def test_what_no_yaml_can_hold_is_refused_by_its_key(value: Any) -> None:
    message = refused({**BASE, "model": {"target": "M", "args": {"a": [value]}}})
    assert "model.args.a.0: is a " in message


def test_a_mapping_that_contains_itself_is_refused() -> None:
    args: dict[str, Any] = {"a": []}
    args["a"].append(args)
    assert "contains itself" in refused({**BASE, "model": {"target": "M", "args": args}})


# Shorthands


def test_an_optimizer_may_be_its_name_alone_and_its_default_rate_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, optimizer="Adam")
    train(path)
    capsys.readouterr()
    start = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[0])
    assert start["update"] == "Adam with lr 0.001, its default (optimizer.args.lr is not set)"
    assert cli.main(["show", str(path)]) == 0
    assert start["update"] in " ".join(capsys.readouterr().out.split())
    assert train(written(tmp_path, output=str(tmp_path / "two"))).step == 1
    start = json.loads((tmp_path / "two" / "metrics.jsonl").read_text().splitlines()[0])
    assert start["update"] == ""


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("Accuracy", "accuracy"),
        ("MeanSquaredError", "mean_squared_error"),
        ("F1Score", "f1_score"),
        ("AUROC", "auroc"),
        ("R2Score", "r2_score"),
        ("BinaryF1Score", "binary_f1_score"),
        ("torchmetrics.classification:BinaryAUROC", "binary_auroc"),
        ("torchmetrics.MeanAbsoluteError", "mean_absolute_error"),
    ],
)
def test_metrics_may_be_a_list_and_are_named_by_their_classes(target: str, name: str) -> None:
    for entry_of_list in (target, {"target": target, "args": {}}):
        metrics = load({**BASE, "evaluation": {"metrics": [entry_of_list]}}).values.evaluation.metrics
        assert {key: metric.target for key, metric in metrics.items()} == {name: target}


MULTICLASS = {"task": "multiclass", "num_classes": 4}
LINEAR = "torch.nn.Linear"


@pytest.mark.parametrize(
    ("objective", "model", "metric", "args"),
    [
        ("CrossEntropyLoss", {"num_classes": 4}, "Accuracy", MULTICLASS),
        ("CrossEntropyLoss", {"in_features": 6, "out_features": 4}, "torchmetrics.AUROC", MULTICLASS),
        ("torch.nn:NLLLoss", {"num_labels": 4}, "torchmetrics.classification:F1Score", MULTICLASS),
        ("CrossEntropyLoss", {"num_classes": 3}, {"target": "Accuracy", "args": {"num_classes": 4}}, MULTICLASS),
        ("CrossEntropyLoss", {"num_classes": 4}, {"target": "Recall", "args": {"top_k": 2}}, {**MULTICLASS, "top_k": 2}),
        ("MSELoss", {"num_classes": 4}, {"target": "Accuracy", "args": {"task": "multiclass"}}, MULTICLASS),
        ("CrossEntropyLoss", {"num_classes": 2}, {"target": "Accuracy", "args": {"task": "binary"}}, {"task": "binary"}),
        ("BCEWithLogitsLoss", {"out_features": 1}, "Accuracy", {"task": "binary"}),
        ("BCEWithLogitsLoss", {"out_features": 3}, "Accuracy", {"task": "multilabel", "num_labels": 3}),
        ("MSELoss", {}, "MeanSquaredError", {}),
        ("MSELoss", {"num_classes": 4}, "mine:Accuracy", {}),
    ],
)  # fmt: skip
def test_a_metric_takes_its_task_and_number_of_classes_from_objective_and_model(
    objective: str, model: dict[str, Any], metric: Any, args: dict[str, Any]
) -> None:
    changes = {"objective": objective, "model": {"target": LINEAR, "args": model}, "evaluation": {"metrics": [metric]}}
    (found,) = load({**BASE, **changes}).values.evaluation.metrics.values()
    assert found.args == args


@pytest.mark.parametrize(
    ("objective", "args", "line"),
    [
        ("MSELoss", {}, "accuracy: {target: Accuracy, args: {task: multiclass, num_classes: N}}"),
        ("CrossEntropyLoss", {"top_k": 2}, "args: {task: multiclass, num_classes: N, top_k: 2}}"),
        ("CrossEntropyLoss", {"task": "multilabel"}, "args: {task: multilabel, num_labels: N}}"),
        ("BCEWithLogitsLoss", {}, "or {task: binary} for a model with one output"),
    ],
)
def test_a_metric_whose_task_nothing_tells_is_one_message_with_the_line_to_write(
    objective: str, args: dict[str, Any], line: str
) -> None:
    metrics = {"accuracy": {"target": "Accuracy", "args": args}}
    changes = {"objective": objective, "model": "tests.test_additivity:Net", "evaluation": {"metrics": metrics}}
    loaded = load({**BASE, **changes})
    with pytest.raises(ConfigurationError, match=r"^configuration evaluation\.metrics\.accuracy: write ") as caught:
        check_components(loaded)
    assert line in str(caught.value)


def test_two_metrics_of_one_class_in_a_list_are_refused_with_the_cure() -> None:
    message = refused({**BASE, "evaluation": {"metrics": ["Accuracy", {"target": "torchmetrics:Accuracy"}]}})
    assert "is in the list twice" in message
    assert "{first: {target: torchmetrics:Accuracy" in message
    assert "a list holds classes" in refused({**BASE, "evaluation": {"metrics": [3]}})


def test_dotted_targets_train_and_are_what_their_short_names_are(tmp_path: Path) -> None:
    assert train(written(tmp_path, schedule="torch.optim.lr_scheduler.ConstantLR")).step == 1
    message = refused_by_start(written(tmp_path, optimizer={"target": "torch.optim.LBFGS"}))
    assert "needs the loss evaluated several times" in message


def refused_by_start(source: Any, *overrides: str) -> str:
    with pytest.raises(ConfigurationError) as caught:
        train(source, *overrides)
    return str(caught.value)


# Flags


@pytest.mark.parametrize(
    "flags",
    [
        ["--optimizer.args.lr=0.5", "--limit.steps", "2", "--seed=-3"],
        ["--optimizer.args.lr", "0.5", "--seed", "-3", "limit.steps=2"],
        ["optimizer.args.lr=0.5", "--limit.steps=2", "--seed", "-3"],
    ],
    ids=str,
)
@pytest.mark.parametrize("first", [False, True])
def test_keys_may_be_given_like_options_before_and_after_the_file(flags: list[str], first: bool) -> None:
    if first and not flags[0].startswith("--"):
        return
    line = [*flags, "run.yaml"] if first else ["run.yaml", *flags]
    if first and "limit.steps=2" in flags:
        line = ["--optimizer.args.lr", "0.5", "--seed", "-3", "run.yaml", "limit.steps=2"]
    for command in ("train", "show", "doctor"):
        options = parsed(cli._parser(command), [command, *line, "--processes", "2"])
        assert str(options.config) == "run.yaml"
        assert set(options.overrides) == {"optimizer.args.lr=0.5", "limit.steps=2", "seed=-3"}
        assert options.processes == 2
    assert with_flags_as_overrides(line)[0] == "run.yaml"


def test_options_of_a_command_stay_its_own() -> None:
    line = ["predict", "run.yaml", "--output", "x.csv", "--checkpoint.keep=3", "--checkpoint", "newest", "--seed=1"]
    options = parsed(cli._parser("predict"), line)
    assert (str(options.output), options.checkpoint) == ("x.csv", "newest")
    assert options.overrides == ["checkpoint.keep=3", "seed=1"]
    assert parsed(cli._parser("train"), ["train", "run.yaml", "--output=x"]).overrides == ["output=x"]


@pytest.mark.parametrize("line", [["--optimizer.args.lr"], ["--seed", "--limit.steps=2"]])
def test_a_key_without_a_value_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str], line: list[str]) -> None:
    path = str(written(tmp_path))
    for command in (lambda: cli.main(["train", path, *line]), lambda: launched.run("train", [path, *line])):
        assert command() == 2
        assert f"command line {line[0][2:]}: has no value" in capsys.readouterr().err


def test_the_entry_point_takes_flags_and_says_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path)
    assert launched.run("train", [str(path), "--limit.steps", "2", "--name=flagged"]) == 0
    start = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[0])
    assert (start["name"], start["total_steps"]) == ("flagged", 2)
    assert train(path, "--limit.steps=3").step == 3
    capsys.readouterr()
    for act in ("train", "doctor"):
        for line in ([], ["limit.steps=2"], ["--limit.steps=2"]):
            assert launched.run(act, line) == 2
            message = capsys.readouterr().err
            assert "CONFIG is missing" in message
            assert "usage:" in message
    monkeypatch.setenv("RANK", "1")
    assert launched.run("train", []) == 2
    assert capsys.readouterr().err == ""


# Keys in the run folder's name


@pytest.mark.parametrize(
    ("template", "folder"),
    [
        ("runs/{name}-{optimizer.args.lr}", "runs/mine-0.01"),
        ("{optimizer.target}/{batch.global_size}-{seed}", "torch.optim.SGD/16-0"),
        ("{limit.steps}{limit.epochs}{reporting.progress}", "1nonetrue"),
        ("{optimizer.args.betas}_{model.args.path}", "0.9-0.99_a-b-c-d"),
        ("{optimizer.groups.0.args.lr}", "1e-05"),
        ("{{{name}}}", "{mine}"),
        ("plain", "plain"),
    ],
)
def test_the_run_folder_may_have_any_key_in_its_name(template: str, folder: str) -> None:
    changes = {
        "name": "mine",
        "output": template,
        "model": {"target": "M", "args": {"path": "../a/b c\\d"}},
        "optimizer": {
            "target": "torch.optim.SGD",
            "args": {"lr": 0.01, "betas": [0.9, 0.99]},
            "groups": [{"match": ["*"], "args": {"lr": 1e-5}}],
        },
    }
    assert load({**BASE, **changes}).output == Path(folder)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("runs/{optimizer.args.lrr}", ["{optimizer.args.lrr}", "did you mean 'lr'?"]),
        ("runs/{nmae}", ["did you mean 'name'?"]),
        ("runs/{optimizer.args}", ["is a section"]),
        ("runs/{optimizer.groups.3}", ["no such key"]),
        ("runs/{output}", ["this key itself"]),
        ("runs/{model.args.api_key}", ["is a secret"]),
        ("runs/{name", ["write '{{'"]),
        ("runs/{}", ["no such key"]),
        ("", ["is empty"]),
        ("  ", ["is empty"]),
        ("/", ["the root directory"]),
    ],
)
def test_a_name_that_cannot_be_filled_in_is_refused_with_its_line(
    tmp_path: Path, template: str, words: list[str]
) -> None:
    path = written(tmp_path, output=template, model={"target": "M", "args": {"api_key": "x"}})
    line = next(n for n, text in enumerate(path.read_text().splitlines(), 1) if text.startswith("output"))
    message = refused(path)
    assert message.startswith(f"{path}:{line} output: ")
    assert all(word in message for word in words)


def test_a_run_folder_with_braces_in_its_name_is_found_again(tmp_path: Path) -> None:
    train(written(tmp_path, output=str(tmp_path / "{{{name}}}-{optimizer.args.lr}")))
    folder = tmp_path / "{run}-0.01"
    assert load_run(folder).output == folder


# Keys that may change


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("optimizr", ["did you mean 'optimizer'?"]),
        ("optimizer.arg.lr", ["did you mean 'args'?"]),
        ("lr", ["no key 'lr'"]),
        ("optimizer.groups.0.args.lr", ["give 'optimizer.groups'"]),
        ("data.train.arg", ["did you mean 'args'?"]),
        ("seed.x", ["give 'seed'"]),
    ],
)
def test_a_change_of_a_key_that_does_not_exist_is_refused(key: str, words: list[str]) -> None:
    message = refused({**BASE, "resume": {"allow_changes": ["optimizer.args.lr", key]}})
    assert "resume.allow_changes.1" in message
    assert all(word in message for word in words)


def test_keys_that_exist_and_arguments_that_did_may_change() -> None:
    keys = ["optimizer", "optimizer.args.gone", "data.train.args.x.y", "objective.losses.a.weight", "batch.slots", "schedule",
            "schedule.args.T_max", "data.fields.inputs", "strategy.fsdp.mixed_precision", "model.weights.file"]  # fmt: skip
    load({**BASE, "resume": {"allow_changes": keys}})


# Describing


@pytest.fixture(scope="module")
def own_code(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A YAML file beside a module of the user's."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "described_parts.py").write_text(
        "from torch import nn\n\nclass Net(nn.Module):\n    '''Mine, and mine alone.\n\n    More.\n    '''\n"
        "    def __init__(self, width: int = 3, *, depth=2): pass\n\ndef load(name: str, **others): pass\n"
    )
    path = list(sys.path)
    yield written(folder)
    sys.path[:] = path
    sys.modules.pop("described_parts", None)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("AdamW", ["an optimizer", "params", "passed by Lockstep", "betas", "(0.9, 0.999)", "Implements AdamW"]),
        ("CrossEntropyLoss", ["a loss", "torch.nn", "label_smoothing: float = 0.0"]),
        ("CosineAnnealingLR", ["a schedule", "T_max: int", "the run's length"]),
        ("MeanSquaredError", ["a metric", "num_outputs"]),
        ("MLP", ["a model", "in_features: int", "required"]),
        ("digits", ["a data source"]),
        ("FocalLoss", ["a loss", "runtime.losses.focal"]),
        ("RandomSampler", ["a sampler", "replacement"]),
        ("torch.nn.Linear", ["a module", "in_features: int", "bias: bool = True"]),
        ("described_parts:Net", ["a module", "width: int = 3", "depth", "Mine, and mine alone."]),
        ("described_parts.load", ["name: str", "required", "**others: any other arguments"]),
        ("math:pi", ["cannot be called"]),
    ],
)
def test_describe_lists_the_arguments(
    own_code: Path, capsys: pytest.CaptureFixture[str], target: str, words: list[str]
) -> None:
    assert cli.main(["describe", target, str(own_code)]) == 0
    told = capsys.readouterr().out
    for word in words:
        assert word in told


@pytest.mark.parametrize(
    ("target", "word"),
    [
        ("AdmW", "'AdamW'"),
        ("torch.optim.AdmW", "'AdamW'"),
        ("nowhere_to_be_found:x", "no module 'nowhere_to_be_found'"),
    ],
)
def test_what_nothing_is_called_is_told(capsys: pytest.CaptureFixture[str], target: str, word: str) -> None:
    assert cli.main(["describe", target]) == 2
    assert word in capsys.readouterr().err
