"""The shipped configurations load, name the schema, and reach what their headers say."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from runtime.build.components import check_components
from runtime.config.file import json_schema, load
from runtime.session import train

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_a_shipped_configuration_is_correct_and_names_the_schema(path: Path) -> None:
    loaded = load(path)
    optional = [
        package for package in ("transformers", "efficientnet_lite_pytorch") if f'"{package}:' in path.read_text()
    ]
    if all(find_spec(package) is not None for package in optional):
        check_components(loaded)
    assert path.read_text().startswith("# yaml-language-server: $schema=schema.json\n")
    assert json.loads((path.parent / "schema.json").read_text()) == json_schema()


def test_diabetes_beats_least_squares(tmp_path: Path) -> None:
    (path,) = [p for p in CONFIGS if p.stem == "diabetes"]
    result = train(path, f"output={tmp_path}/run", "reporting.progress=false")
    rmse = result.results["rmse"]
    assert isinstance(rmse, float) and rmse < 0.747
    assert result.results["samples"] == 89


def test_digits_are_recognised_after_a_few_epochs(tmp_path: Path) -> None:
    (path,) = [p for p in CONFIGS if p.stem == "digits"]
    result = train(path, f"output={tmp_path}/run", "limit.epochs=4")
    accuracy = result.results["accuracy"]
    assert isinstance(accuracy, float) and accuracy >= 0.95
    assert result.results["samples"] == 360


@pytest.mark.long
def test_the_language_model_learns_the_standard_library(tmp_path: Path) -> None:
    (path,) = [p for p in CONFIGS if p.stem == "gpt_stdlib"]
    result = train(path, f"output={tmp_path}/run")
    loss = result.results["loss"]
    assert isinstance(loss, float) and loss < 1.8
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(r["tokens_per_second"] > 0 for r in records if r["event"] == "train")
