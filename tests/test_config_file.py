"""What a YAML file may say, and what is told, with file, line and key, where it says something wrong."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from runtime.config.file import LoadedConfiguration, exact_keys, json_schema, load
from runtime.errors import ConfigurationError

REPOSITORY = Path(__file__).parents[1]
GOOD = """\
model: zoo:Net
data: {train: zoo:points}
batch: {global_size: 8}
objective: MSELoss
optimizer: {target: SGD}
limit: {steps: 3}
"""


def loaded(folder: Path, text: str | bytes, *overrides: str) -> LoadedConfiguration:
    path = folder / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load(path, overrides)


def mistakes(folder: Path, text: str | bytes, *overrides: str) -> list[tuple[str, str, str]]:
    """Where, key and message of every mistake; the file's folder is left out."""
    with pytest.raises(ConfigurationError) as caught:
        loaded(folder, text, *overrides)
    return [(p.where.replace(f"{folder}/", ""), p.key, p.what) for p in caught.value.problems]


def only_mistake(folder: Path, text: str | bytes, *overrides: str) -> tuple[str, str, str]:
    (mistake,) = mistakes(folder, text, *overrides)
    return mistake


def without(*sections: str) -> str:
    return "".join(line for line in GOOD.splitlines(keepends=True) if line.partition(":")[0] not in sections)


# Scalars: the core schema of YAML 1.2.2, section 10.3.2


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("3e-4", 0.0003), ("1E5", 100_000.0), ("-2e+3", -2000.0), ("12e03", 12_000.0), (".5", 0.5), ("5.", 5.0),
        ("-.5e2", -50.0), ("5.e2", 500.0), ("1.5", 1.5), (".inf", float("inf")), ("-.INF", float("-inf")),
        ("3", 3), ("+3", 3), ("-07", -7), ("0", 0),
        ("0x10", 16), ("0xfF", 255), ("0o10", 8),
        ("010", 10), ("08", 8),  # no octal without an o: a seed of 010 is ten
        ("true", True), ("True", True), ("FALSE", False),
        ("null", None), ("~", None), ("Null", None), ("", None),
        ("no", "no"), ("No", "No"), ("on", "on"), ("off", "off"), ("y", "y"), ("YES", "YES"), ("tRue", "tRue"),
        ("0b11", "0b11"), ("1_000", "1_000"), ("1:30", "1:30"), ("190:20:30.15", "190:20:30.15"),
        ("2024-01-01", "2024-01-01"), ("2024-13-45", "2024-13-45"), ("2024-01-01T00:00:00Z", "2024-01-01T00:00:00Z"),
        ("=", "="), ("1e", "1e"), ("e5", "e5"), ("0x", "0x"), ("0o8", "0o8"), ("1.2.3", "1.2.3"),
        ("'3e-4'", "3e-4"), ('"no"', "no"), ("'010'", "010"), ("!!str 3", "3"), ("!!float 3", 3.0),
    ],
)  # fmt: skip
def test_scalars_are_those_of_yaml_1_2(tmp_path: Path, written: str, value: Any) -> None:
    found = loaded(tmp_path, without("model") + f"model: {{target: zoo:Net, args: {{a: {written}}}}}\n")
    assert found.values.model.args == {"a": value}
    assert type(found.values.model.args["a"]) is type(value)
    assert loaded(tmp_path, GOOD, f"objective={{target: MSELoss, args: {{a: {written}}}}}").values.objective.args == {
        "a": value
    }


@pytest.mark.parametrize("word", ["no", "yes", "on", "off", "NO"])
def test_yes_and_no_in_a_boolean_key_are_refused_and_explained(tmp_path: Path, word: str) -> None:
    where, key, what = only_mistake(tmp_path, GOOD + f"reporting:\n  progress: {word}\n")
    assert (where, key) == ("run.yaml:8", "reporting.progress")
    assert "true or false" in what
    assert f"{word} is text" in what


@pytest.mark.parametrize("section", ["compile", "reporting.wandb"])
def test_yes_and_no_are_explained_where_true_and_false_stand_for_a_section(tmp_path: Path, section: str) -> None:
    assert loaded(tmp_path, GOOD, f"{section}=false")
    where, key, what = only_mistake(tmp_path, GOOD, f"{section}=no")
    assert (where, key) == ("command line", section)
    assert "true" in what
    assert "no is text" in what


# Keys


@pytest.mark.parametrize(
    ("text", "where", "key", "first"),
    [
        (GOOD + "model: zoo:Other\n", "run.yaml:7", "model", 1),
        (GOOD + "averaging:\n  decay: 0.9\n  evaluate: true\n  decay: 0.8\n", "run.yaml:10", "averaging.decay", 8),
        (GOOD + "checkpoint:\n  best:\n  - metric: a\n    metric: b\n", "run.yaml:10", "checkpoint.best.0.metric", 9),
        (without("model") + "model:\n  target: zoo:Net\n  args:\n    a: 1\n    b: {c: 1,\n     c: 2}\n", "run.yaml:11",
         "model.args.b.c", 10),
    ],
)  # fmt: skip
def test_a_key_written_twice_is_refused_with_both_lines(
    tmp_path: Path, text: str, where: str, key: str, first: int
) -> None:
    found = mistakes(tmp_path, text)[0]
    assert found[:2] == (where, key)
    assert "twice" in found[2]
    assert f"line {first}" in found[2]


def test_a_key_written_three_times_is_refused_twice_each_time_with_the_first_line(tmp_path: Path) -> None:
    found = mistakes(tmp_path, GOOD + "seed: 1\nseed: 2\nseed: 3\n")
    assert [(where, "line 7" in what) for where, _, what in found] == [("run.yaml:8", True), ("run.yaml:9", True)]


def test_a_key_written_twice_within_an_override_is_refused(tmp_path: Path) -> None:
    where, key, what = only_mistake(tmp_path, GOOD, "averaging={decay: 0.9, decay: 0.8}")
    assert (where, key) == ("command line", "averaging.decay")
    assert "twice" in what


@pytest.mark.parametrize(
    ("addition", "key", "meant"),
    [
        ("sede: 1", "sede", "'seed'"),
        ("optimiser: {target: SGD}", "optimiser", "'optimizer'"),
        ("strategy: {ddp: {bucket: 1}}", "strategy.ddp.bucket", "'bucket_mb'"),
        ("epochs: 3", "epochs", "'limit.epochs'"),
        ("num_workers: 2", "num_workers", "'data.loader.num_workers'"),
        ("reporting: {num_workers: 2}", "reporting.num_workers", "'data.loader.num_workers'"),
        ("checkpoint: {best: [{metric: loss, mode: min, kep: 1}]}", "checkpoint.best.0.kep", "'keep'"),
        ("evaluation: {metrics: {a: {target: F1Score, arg: {}}}}", "evaluation.metrics.a.arg", "'args'"),
    ],
)
def test_an_unknown_key_is_told_with_the_one_that_was_meant(
    tmp_path: Path, addition: str, key: str, meant: str
) -> None:
    where, found, what = only_mistake(tmp_path, GOOD + addition + "\n")
    assert (where, found) == ("run.yaml:7", key)
    assert "unknown key" in what
    assert f"did you mean {meant}?" in what


def test_an_unknown_key_like_no_other_is_told_with_those_that_are_known(tmp_path: Path) -> None:
    _, _, what = only_mistake(tmp_path, GOOD + "strategy: {zzz: 1}\n")
    assert "kind, world_size, ddp" in what


@pytest.mark.parametrize("key", ["1", "true", "~", "1.5"])
def test_a_key_that_is_no_text_is_refused_at_its_line(tmp_path: Path, key: str) -> None:
    where, found, what = only_mistake(tmp_path, GOOD + f"{key}: 3\n")
    assert (where, found) == ("run.yaml:7", key)
    assert "Traceback" not in what


@pytest.mark.parametrize(
    ("addition", "key", "words"),
    [
        ("seed: 3.5", "seed", ["integer", "3.5"]),
        ("seed: '3'", "seed", ["integer", "'3'"]),
        ("seed: 1e3", "seed", ["integer", "1000.0"]),
        ("seed: true", "seed", ["integer", "True"]),
        ("seed:", "seed", ["integer", "nothing"]),
        ("seed: 9223372036854775808", "seed", ["9223372036854775808"]),
        ("name: a/b", "name", ["'a/b'"]),
        ("precision: fp8", "precision", ["'fp32', 'bf16' or 'fp16'", "'fp8'"]),
        ("averaging: {decay: 1.0}", "averaging.decay", ["less than 1", "1.0"]),
        ("averaging: true", "averaging", ["section", "True"]),
        ("evaluation: {every: 3}", "evaluation.every", ["'200 steps' or '1 epoch'", "3"]),
        ("evaluation: {every: 0 steps}", "evaluation.every", ["'200 steps' or '1 epoch'", "'0 steps'"]),
        ("evaluation: {metrics: [a]}", "evaluation.metrics", ["section", "['a']"]),
        ("checkpoint: {best: {metric: loss}}", "checkpoint.best", ["list", "{'metric': 'loss'}"]),
        ("checkpoint: {best: [{metric: loss, mode: up}]}", "checkpoint.best.0.mode", ["'min' or 'max'", "'up'"]),
        ("strategy: {world_size: 0}", "strategy.world_size", ["greater than or equal to 1", "0"]),
        ("resume: always", "resume.mode", ["'auto', 'never' or 'must'", "'always'"]),
        ("resume: {allow_changes: seed}", "resume.allow_changes", ["list", "'seed'"]),
    ],
)
def test_a_value_of_the_wrong_type_is_told_with_what_it_should_be_and_what_it_is(
    tmp_path: Path, addition: str, key: str, words: list[str]
) -> None:
    where, found, what = only_mistake(tmp_path, GOOD + addition + "\n")
    assert (where, found) == ("run.yaml:7", key)
    for word in words:
        assert word in what


@pytest.mark.parametrize("section", ["model", "data", "batch", "objective", "optimizer", "limit"])
def test_a_section_that_is_left_out_is_named(tmp_path: Path, section: str) -> None:
    assert only_mistake(tmp_path, without(section))[1:] == (section, "is required")


def test_all_mistakes_are_told_at_once_each_at_its_own_line(tmp_path: Path) -> None:
    text = """\
sede: 1
model: {target: zoo:Net}
data:
  train: zoo:points
  batch_sampler: zoo:Order
  drop_last: true
batch:
  global_size: 8
  micro_size: 9
objective: MSELoss
optimizer:
  target: SGD
  max_grad_norm: high
limit:
  steps: 3
  epochs: 1
checkpoint:
  best:
  - metric: loss
    mode: min
  - metric: loss
    mode: lowest
  -
    metric: loss
  - mode: min
reporting: {progress: no}
"""
    assert {(where, key) for where, key, _ in mistakes(tmp_path, text, "seed=x", "limit.epoch=2", "batch")} == {
        ("run.yaml:1", "sede"),
        ("run.yaml:6", "data.drop_last"),
        ("run.yaml:9", "batch.micro_size"),
        ("run.yaml:13", "optimizer.max_grad_norm"),
        ("run.yaml:22", "checkpoint.best.1.mode"),
        ("run.yaml:24", "checkpoint.best.2.mode"),
        ("run.yaml:25", "checkpoint.best.3.metric"),
        ("run.yaml:26", "reporting.progress"),
        ("command line", "seed"),
        ("command line", "limit.epoch"),
        ("command line", ""),
    }


def test_a_key_written_twice_hides_no_other_mistake(tmp_path: Path) -> None:
    found = mistakes(tmp_path, GOOD + "sede: 1\nseed: x\nmodel: zoo:Other\n", "name=1")
    assert {(where, key) for where, key, _ in found} == {
        ("run.yaml:7", "sede"),
        ("run.yaml:8", "seed"),
        ("run.yaml:9", "model"),
        ("command line", "name"),
    }


# Combinations


@pytest.mark.parametrize(
    ("section", "key", "words"),
    [
        ("limit:\n  steps: 3\n  epochs: 1", "limit", ["either 'epochs' or 'steps'"]),
        ("limit: {}", "limit", ["either 'epochs' or 'steps'"]),
        ("batch: {global_size: 8, micro_size: 9}", "batch.micro_size", ["9", "8"]),
        ("batch: {global_size: 8, micro_size: 2, slots: 3}", "batch.slots", ["3 slots", "at least 4"]),
        ("batch: {global_size: 9, micro_size: 2, slots: 4}", "batch.slots", ["4 slots", "at least 5"]),
        ("data: {train: a:b, sampler: a:c, shuffle: true}", "data.shuffle", ["the sampler decides"]),
        ("data: {train: a:b, batch_sampler: a:c, shuffle: false}", "data.shuffle", ["the sampler decides"]),
        ("data: {train: a:b, sampler: a:c, batch_sampler: a:d}", "data.sampler", ["not both"]),
        ("data: {train: a:b, batch_sampler: a:d, drop_last: true}", "data.drop_last", ["leave 'drop_last' out"]),
        ("checkpoint: {best: [{metric: loss, mode: min}]}", "checkpoint.best", ["needs data.validation"]),
        ("schedule: {target: ReduceLROnPlateau}", "schedule.monitor", ["ReduceLROnPlateau"]),
        ("schedule: {target: StepLR, monitor: loss}", "schedule.monitor", ["ReduceLROnPlateau"]),
        ("schedule: {target: ReduceLROnPlateau, monitor: loss}", "schedule.target", ["needs data.validation"]),
        ("evaluation: {metrics: {loss: F1Score}}", "evaluation.metrics.loss", ["choose another"]),
        ("strategy: {ddp: {static_graph: true, find_unused_parameters: true}}", "strategy.ddp.find_unused_parameters",
         ["static graph"]),
    ],
)  # fmt: skip
def test_settings_that_contradict_each_other_are_refused(
    tmp_path: Path, section: str, key: str, words: list[str]
) -> None:
    text = without(section.partition(":")[0])
    found = mistakes(tmp_path, text + section + "\n")
    line = f"run.yaml:{text.count(chr(10)) + 1}"
    (what,) = [what for where, at, what in found if (where, at) == (line, key)]
    for word in words:
        assert word in what


def test_all_contradictions_between_sections_are_told_at_once(tmp_path: Path) -> None:
    addition = "schedule: {target: ReduceLROnPlateau}\ncheckpoint: {best: [{metric: f1, mode: max}]}\n"
    found = mistakes(tmp_path, GOOD + addition)
    assert [key for _, key, _ in found] == [
        "checkpoint.best.0.metric", "checkpoint.best", "schedule.monitor", "schedule.target",
    ]  # fmt: skip


def test_the_interval_of_evaluations_is_exact_where_a_plateau_scheduler_counts_them(tmp_path: Path) -> None:
    text = without("data") + "data: {train: a:b, validation: a:c}\n"
    plateau = text + "schedule: {target: ReduceLROnPlateau, monitor: loss}\n"
    assert "evaluation.every" not in exact_keys(loaded(tmp_path, text).resolved())
    assert "evaluation.every" in exact_keys(loaded(tmp_path, plateau).resolved())


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ("schedule: {target: ReduceLROnPlateau, monitor: los}", "schedule.monitor"),
        ("checkpoint: {best: [{metric: los, mode: min}]}", "checkpoint.best.0.metric"),
    ],
)
def test_a_result_that_no_evaluation_has_is_refused_with_those_there_are(
    tmp_path: Path, section: str, key: str
) -> None:
    text = without("data") + "data: {train: a:b, validation: a:c}\nevaluation: {metrics: {f1: F1Score}}\n"
    where, found, what = only_mistake(tmp_path, text + section + "\n")
    assert (where, found) == ("run.yaml:8", key)
    assert "'los'" in what
    assert "f1, loss" in what


@pytest.mark.parametrize(
    "section",
    [
        "batch: {global_size: 8, micro_size: 8}",
        "batch: {global_size: 8, micro_size: 2, slots: 4}",
        "batch: {global_size: 9, micro_size: 2, slots: 5}",
        "data: {train: a:b, sampler: a:c, drop_last: true}",
        "data: {train: a:b, batch_sampler: a:c}",
        "limit: {epochs: 2}",
        "limit: {epochs: 2, steps: null}",
        "strategy: {ddp: {bucket_mb: 1}}",
        "compile: true",
        "reporting: {wandb: true}",
        "resume: never",
        "seed: -9223372036854775808",
    ],
)
def test_settings_at_the_edge_of_what_fits_are_taken(tmp_path: Path, section: str) -> None:
    assert loaded(tmp_path, without(section.partition(":")[0]) + section + "\n")


# Overrides


def test_overrides_replace_values_however_deep_and_the_last_one_counts(tmp_path: Path) -> None:
    text = without("data") + "data: {train: a:b, validation: a:c}\ncheckpoint: {best: [{metric: loss, mode: min}]}\n"
    text += "strategy:\n"
    values = loaded(
        tmp_path,
        text,
        "batch.global_size=64",
        "checkpoint.best.0.keep=3",
        "optimizer.args.lr=3e-4",  # creates args
        "averaging.decay=0.5",  # creates a section
        "strategy.ddp.bucket_mb=1",  # fills one that is written without content
        "limit.steps=null",
        "limit.epochs=1",
        "limit.epochs=2",
        "model={target: a:B, args: {width: [1, 2]}}",
        "model.args.width.1=5",
        "name=a=b",
    ).values
    assert values.batch.global_size == 64
    assert [(best.metric, best.keep) for best in values.checkpoint.best] == [("loss", 3)]
    assert values.optimizer.args == {"lr": 0.0003}
    assert values.averaging is not None
    assert values.averaging.decay == 0.5
    assert values.strategy.ddp.bucket_mb == 1
    assert (values.limit.steps, values.limit.epochs) == (None, 2)
    assert values.model.args == {"width": [1, 5]}
    assert values.name == "a=b"


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("seed", ""),
        ("=3", ""),
        ("a..b=3", ""),
        (".seed=3", ""),
        ("seed=[1", "seed"),
        ("seed='", "seed"),
        ("seed=!!int x", "seed"),
        ("seed=", "seed"),
        ("seed=x", "seed"),
        ("sede=3", "sede"),
        ("batch.global_size.x=3", "batch.global_size.x"),
        ("model.args.width=3", "model.args.width"),  # the file gives the model as plain text
        ("checkpoint.best.0.keep=3", "checkpoint.best"),
        ("seed.x=3", "seed"),
        ("data.validation.args={}", "data.validation.target"),
        ("batch={}", "batch.global_size"),
        ("batch.slots=0", "batch.slots"),
        ("batch.micro_size=9", "batch.micro_size"),
    ],
)
def test_a_mistake_in_an_override_is_located_on_the_command_line(tmp_path: Path, override: str, key: str) -> None:
    where, found, _ = only_mistake(tmp_path, GOOD, override)
    assert (where, found) == ("command line", key)


@pytest.mark.parametrize("override", ["checkpoint.best.1.keep=3", "checkpoint.best.1={metric: loss, mode: max}"])
def test_an_override_beyond_the_end_of_a_list_is_refused(tmp_path: Path, override: str) -> None:
    text = without("data") + "data: {train: a:b, validation: a:c}\ncheckpoint: {best: [{metric: loss, mode: min}]}\n"
    assert only_mistake(tmp_path, text, override)[:2] == ("command line", override.partition("=")[0])


def test_a_mistake_beside_an_override_is_still_located_in_the_file(tmp_path: Path) -> None:
    found = mistakes(tmp_path, GOOD + "averaging:\n  decay: 2\n", "averaging.evaluate=1")
    assert {(where, key) for where, key, _ in found} == {
        ("run.yaml:8", "averaging.decay"),
        ("command line", "averaging.evaluate"),
    }


def test_an_override_of_a_section_that_an_anchor_repeats_changes_that_section_alone(tmp_path: Path) -> None:
    text = (
        without("data")
        + "data:\n  train: &points {target: a:b, args: {size: 96}}\n  validation: *points\n  test: {<<: *points}\n"
    )
    data = loaded(tmp_path, text, "data.train.args.size=5").values.data
    assert data.train.args == {"size": 5}
    assert data.validation is not None
    assert data.validation.args == {"size": 96}
    assert data.test is not None
    assert data.test.args == {"size": 96}


def test_overrides_leave_the_callers_mapping_alone() -> None:
    given = {**yaml.safe_load(GOOD), "optimizer": {"target": "SGD", "args": {"lr": 1}}}
    before = json.dumps(given)
    assert load(given, ["optimizer.args.lr=2"]).values.optimizer.args == {"lr": 2}
    assert json.dumps(given) == before


# Files


@pytest.mark.parametrize(
    ("text", "where", "words"),
    [
        (b"- 1\n- 2\n", "run.yaml:1", ["mapping"]),
        (b"hello\n", "run.yaml:1", ["mapping"]),
        (b"null\n", "run.yaml:1", ["mapping"]),
        (GOOD.encode() + b"name: \xff\xfe\n", "run.yaml", ["UTF-8"]),
        (GOOD + "averaging: {decay: 0.9\nseed: 3\n", "run.yaml:8", ["not YAML"]),
        (GOOD + "name: a: b\n", "run.yaml:7", ["not YAML", "mapping values are not allowed"]),
        (GOOD + "averaging:\n\tdecay: 0.9\n", "run.yaml:8", ["not YAML", "cannot start any token"]),
        (GOOD + "seed: *other\n", "run.yaml:7", ["not YAML", "undefined alias"]),
        (GOOD + "---\nseed: 3\n", "run.yaml:7", ["not YAML", "another document"]),
        (GOOD + "name: a\x07b\n", "run.yaml:7", ["not YAML"]),
        (GOOD + "seed: !!int x\n", "run.yaml:7", ["not YAML"]),
        (GOOD + "? [a, b]\n: 3\n", "run.yaml:7", ["not YAML"]),
        (without("model") + "model: &m\n  target: a:b\n  args: {x: *m}\n", "run.yaml:8", ["x"]),
    ],
)
def test_a_file_that_is_no_yaml_mapping_is_refused_in_one_line(
    tmp_path: Path, text: str | bytes, where: str, words: list[str]
) -> None:
    found, key, what = only_mistake(tmp_path, text)
    assert found == where
    assert "\n" not in what
    for word in words:
        assert word in f"{key} {what}"


@pytest.mark.parametrize("text", ["", "# nothing yet\n"])
def test_an_empty_file_lacks_every_required_section(tmp_path: Path, text: str) -> None:
    found = mistakes(tmp_path, text)
    assert [key for _, key, _ in found] == ["model", "data", "batch", "objective", "optimizer", "limit"]
    assert {where for where, _, _ in found} == {"run.yaml:1"}


def test_a_file_that_cannot_be_read_is_named_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, reason in (
        (tmp_path / "missing.yaml", "No such file"),
        (tmp_path, "directory"),
        (tmp_path / "file" / "x.yaml", "Not a directory"),
    ):
        with pytest.raises(ConfigurationError, match=f"{re.escape(str(path))}.*{reason}"):
            load(path)


def test_windows_line_ends_and_a_byte_order_mark_do_no_harm(tmp_path: Path) -> None:
    plain = loaded(tmp_path, GOOD).values
    assert loaded(tmp_path, GOOD.replace("\n", "\r\n")).values == plain
    assert loaded(tmp_path, b"\xef\xbb\xbf" + GOOD.encode()).values == plain


def test_a_tag_that_would_run_code_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    proof = tmp_path / "ran"
    where, _, what = only_mistake(tmp_path, GOOD + f"name: !!python/object/apply:os.mkdir ['{proof}']\n")
    assert where == "run.yaml:7"
    assert "not YAML" in what
    assert not proof.exists()


def test_anchors_and_merge_keys_fill_in_what_is_not_written(tmp_path: Path) -> None:
    text = """\
data:
  train: &points
    target: a:points
    args: {split: train, size: 9}
    transform: a:noise
  validation:
    <<: *points
    args: {split: validation}
  test: *points
"""
    data = loaded(tmp_path, without("data") + text).values.data
    assert data.validation is not None
    assert (data.validation.target, data.validation.args) == ("a:points", {"split": "validation"})
    assert data.validation.transform == data.train.transform
    assert data.test == data.train


def test_a_mistake_behind_an_anchor_is_located_where_it_is_written(tmp_path: Path) -> None:
    text = without("data") + "data:\n  train: &points\n    target: a:b\n    argz: {}\n  validation: *points\n"
    assert [mistake[:2] for mistake in mistakes(tmp_path, text)] == [
        ("run.yaml:9", "data.train.argz"),
        ("run.yaml:9", "data.validation.argz"),
    ]


# Resolved values


def test_secrets_are_hidden_however_deep(tmp_path: Path) -> None:
    args = {"api_key": "s1", "nested": [{"HF_TOKEN": "s2", "Password": "s3"}], "client_secret": "s4", "keys": "shown"}
    resolved = load({**yaml.safe_load(GOOD), "model": {"target": "a:b", "args": args}}).resolved()
    written = yaml.safe_dump(resolved)
    assert not re.search(r"s[1-4]\b", written)
    assert resolved["model"]["args"]["keys"] == "shown"
    assert {"api_key", "nested", "client_secret", "keys"} == set(resolved["model"]["args"])


def test_resolved_values_hold_every_default_and_the_runs_name(tmp_path: Path) -> None:
    resolved = loaded(tmp_path, GOOD).resolved()
    assert resolved["name"] == "run"  # the file's
    assert resolved["checkpoint"] == {"every": "1 epoch", "keep": 2, "best": []}
    assert resolved["model"]["target"] == "zoo:Net" and resolved["model"]["args"] == {}
    assert resolved["strategy"]["ddp"]["bucket_mb"] == 25


def test_resolved_values_load_again_to_the_same_values(tmp_path: Path) -> None:
    text = (
        without("model", "data", "limit")
        + """\
model:
  target: zoo:Net
  args: {a: .inf, b: -.inf, c: 1e-5, d: 3, e: [1, 2.5, x, null, true], f: {0: zero, 1: one}, g: "no", h: "", i: 1e22,
         j: "2024-01-01", k: "010", l: "1:30", m: "~", n: "ü", o: "a: b\\n c", p: " x ", q: "#", r: {s: {}}, t: []}
data: {train: a:b, validation: {target: a:c, transform: a:d}}
limit: {epochs: 2}
evaluation: {every: 3 steps, metrics: {f1: {target: F1Score, args: {task: binary}}}}
checkpoint: {every: 1 epoch, best: [{metric: f1, mode: max}]}
schedule: {target: ReduceLROnPlateau, monitor: f1}
reporting: {wandb: true}
compile: true
resume: never
name: other
"""
    )
    first = loaded(tmp_path, text)
    (tmp_path / "again").mkdir()
    again = loaded(tmp_path / "again", yaml.safe_dump(first.resolved(), sort_keys=False))
    assert again.values == first.values
    assert again.resolved() == first.resolved()


def test_a_value_that_no_yaml_can_hold_is_refused_by_its_key() -> None:
    given = {**yaml.safe_load(GOOD), "model": {"target": "a:b", "args": {"activation": len}}}
    with pytest.raises(ConfigurationError, match=r"model\.args\.activation"):
        load(given).resolved()


@pytest.mark.parametrize(
    ("override", "exact"),
    [
        ("limit.steps=9", False),
        ("strategy.world_size=2", False),
        ("data.loader.num_workers=4", False),
        ("data.loader.start_method=spawn", False),
        ("batch.micro_size=2", False),  # K, not the largest slot, is part of the run
        ("reporting.every=3 steps", False),
        ("reporting.wandb=true", False),
        ("checkpoint.every=3 steps", False),
        ("checkpoint.keep=9", False),
        ("evaluation.every=3 steps", False),
        ("evaluation.micro_size=2", False),
        ("evaluation.metrics={f1: F1Score}", False),
        ("evaluation.metrics.f1={target: F1Score, args: {task: binary}}", False),
        ("resume=must", False),
        ("resume.allow_changes=[seed]", False),
        ("name=other", False),
        ("output=elsewhere", False),
        ("code=elsewhere", False),
        ("model=zoo:Other", True),
        ("model={target: zoo:Net, args: {width: 3}}", True),
        ("data.train=zoo:other", True),
        ("data.train={target: zoo:points, args: {size: 3}}", True),
        ("data.train={target: zoo:points, transform: zoo:noise}", True),
        ("data.shuffle=false", True),
        ("data.drop_last=true", True),
        ("data.sampler=a:b", True),
        ("data.collate=a:b", True),
        ("batch.global_size=16", True),
        ("batch.slots=8", True),
        ("objective=L1Loss", True),
        ("optimizer.target=AdamW", True),
        ("optimizer.args.lr=0.5", True),
        ("optimizer.max_grad_norm=1", True),
        ("optimizer.groups=[{match: ['*.bias']}]", True),
        ("schedule={target: StepLR}", True),
        ("averaging={decay: 0.5}", True),
        ("precision=bf16", True),
        ("matmul=high", True),
        ("batch_norm=sync", True),
        ("compile=true", True),
        ("strategy.ddp.communication_hook=fp16", True),
        ("seed=1", True),
    ],
)
def test_keys_on_which_the_result_depends_are_exact_and_the_others_free(
    tmp_path: Path, override: str, exact: bool
) -> None:
    before, after = (exact_keys(loaded(tmp_path, GOOD, *o).resolved()) for o in ((), (override,)))
    assert (before != after) == exact
    changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    named = override.partition("=")[0]
    assert all(f"{key}.".startswith(f"{named}.") or named.startswith(f"{key}.") for key in changed)


def test_structure_is_checked_without_torch(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(GOOD + "sede: 3\n")
    script = (
        "import sys\n"
        "import runtime.config.file\n"
        "from runtime.cli import main\n"
        "code = main(['train', 'run.yaml'])\n"
        "print(code, [name for name in ('torch', 'numpy', 'accelerate', 'torchmetrics') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stderr == "lockstep: run.yaml:7 sede: unknown key; did you mean 'seed'?\n"
    assert done.stdout == "2 []\n"


# The JSON Schema


def refusals(value: Any, schema: Mapping[str, Any], root: Mapping[str, Any], path: str = "") -> list[str]:
    """Validate against the part of JSON Schema (draft 2020-12) that the schema uses; an unknown keyword fails."""
    known = {
        "$ref", "$defs", "$schema", "anyOf", "oneOf", "type", "enum", "const", "properties", "required",
        "additionalProperties", "items", "pattern", "minLength", "minItems", "minimum", "maximum", "exclusiveMinimum",
        "exclusiveMaximum", "title", "description", "default", "examples", "resume",
    }  # fmt: skip
    assert set(schema) <= known, f"{path}: keywords this test does not know: {set(schema) - known}"
    found = []
    if "$ref" in schema:
        found += refusals(value, root["$defs"][schema["$ref"].removeprefix("#/$defs/")], root, path)
    for choice in ("anyOf", "oneOf"):
        if choice in schema and all(refusals(value, option, root, path) for option in schema[choice]):
            found.append(f"{path}: no choice fits {value!r}")
    types = {
        "object": isinstance(value, dict), "array": isinstance(value, list), "string": isinstance(value, str),
        "boolean": isinstance(value, bool), "null": value is None,
        "integer": isinstance(value, int) and not isinstance(value, bool),
        "number": isinstance(value, int | float) and not isinstance(value, bool),
    }  # fmt: skip
    if "type" in schema and not any(types[t] for t in [schema["type"]]):
        return [*found, f"{path}: {value!r} is no {schema['type']}"]
    if ("enum" in schema and value not in schema["enum"]) or ("const" in schema and value != schema["const"]):
        found.append(f"{path}: {value!r} is no choice")
    if isinstance(value, dict):
        found += [f"{path}: lacks {key}" for key in schema.get("required", []) if key not in value]
        for key, inner in value.items():
            rule = schema.get("properties", {}).get(key, schema.get("additionalProperties", True))
            if rule is False:
                found.append(f"{path}.{key}: unknown")
            elif isinstance(rule, Mapping):
                found += refusals(inner, rule, root, f"{path}.{key}")
    if isinstance(value, list):
        found += [
            r for n, inner in enumerate(value) for r in refusals(inner, schema.get("items", {}), root, f"{path}.{n}")
        ]
        found += [f"{path}: too short"] * (len(value) < schema.get("minItems", 0))
    if isinstance(value, str):
        found += [f"{path}: too short"] * (len(value) < schema.get("minLength", 0))
        found += [f"{path}: {value!r} does not match"] * (not re.search(schema.get("pattern", ""), value))
    if types["number"]:
        fits = (
            value >= schema.get("minimum", value)
            and value <= schema.get("maximum", value)
            and value > schema.get("exclusiveMinimum", value - 1)
            and value < schema.get("exclusiveMaximum", value + 1)
        )
        found += [f"{path}: {value!r} is out of range"] * (not fits)
    return found


IN_FULL = """\
model: {target: zoo:Net}
data: {train: {target: zoo:points}}
batch: {global_size: 8}
objective: {target: MSELoss}
optimizer: {target: SGD}
limit: {steps: 3}
"""


def in_full_with(section: str) -> str:
    kept = [line for line in IN_FULL.splitlines() if line.partition(":")[0] != section.partition(":")[0]]
    return "\n".join([*kept, section, ""])


def agrees_with_schema(text: str) -> bool:
    schema = json_schema()
    return not refusals(yaml.safe_load(text), schema, schema)


@pytest.mark.parametrize(
    "section",
    [
        "model: {target: zoo:Net, args: {width: 3}}",
        "model: zoo:Net",
        "objective: MSELoss",
        "data: {train: zoo:points}",
        "data: {train: {target: zoo:points}, validation: zoo:points, collate: zoo:stack, sampler: {target: zoo:Order}}",
        "evaluation: {metrics: {f1: F1Score}}",
        "evaluation: {every: 200 steps}",
        "compile: true",
        "compile: false",
        "compile: {mode: max-autotune}",
        "reporting: {wandb: true}",
        "reporting: {wandb: {tags: [a]}}",
        "resume: never",
        "resume: {allow_changes: [seed]}",
        "schedule: {target: StepLR}",
        "averaging: {}",
    ],
)
def test_the_schema_takes_what_the_loader_takes(tmp_path: Path, section: str) -> None:
    text = in_full_with(section)
    assert loaded(tmp_path, text)
    assert agrees_with_schema(text)


@pytest.mark.parametrize(
    "section",
    [
        "sede: 3",
        "seed: x",
        "seed: 9223372036854775808",
        "model: {args: {}}",
        "model: 3",
        "data: {}",
        "data: {train: 3}",
        "compile: 3",
        "resume: always",
        "reporting: {wandb: 3}",
        "evaluation: {every: 3}",
        "evaluation: {every: 0 steps}",
        "batch: {global_size: 0}",
        "averaging: {decay: 1.0}",
        "optimizer: {target: SGD, groups: [{match: []}]}",
    ],
)
def test_the_schema_refuses_what_the_loader_refuses(tmp_path: Path, section: str) -> None:
    text = in_full_with(section)
    assert mistakes(tmp_path, text)
    assert not agrees_with_schema(text)


def test_every_key_of_the_schema_is_described() -> None:
    schema = json_schema()
    sections = {"": schema, **schema["$defs"]}
    bare = [
        f"{name}.{key}"
        for name, section in sections.items()
        for key, rule in section.get("properties", {}).items()
        if "description" not in rule and "description" not in sections.get(rule.get("$ref", "").rpartition("/")[2], {})
    ]
    assert bare == []
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"


def test_shipped_configurations_load_and_agree_with_the_schema() -> None:
    for path in sorted((REPOSITORY / "configs").glob("*.yaml")):
        assert load(path).name == path.stem
        assert agrees_with_schema(path.read_text()), path


def test_the_shipped_schema_is_up_to_date() -> None:
    shipped = json.loads((REPOSITORY / "configs" / "schema.json").read_text())
    assert shipped == json_schema(), "run: lockstep schema > configs/schema.json"
