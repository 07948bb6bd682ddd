"""Every key that names a class or a function is in the table that the check and the builders share."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_origin

import pytest
from pydantic import BaseModel

from runtime.build.builder import Builder
from runtime.build.components import TABLE, Components, check_components
from runtime.config.file import load
from runtime.config.sections import RunConfiguration
from runtime.errors import ConfigurationError
from tests.observed import configuration

ALL: dict[str, Any] = {
    "model": "tiny:Mlp",
    "data": {
        "train": {"target": "tiny:points", "transform": "tiny:doubled"},
        "validation": "tiny:points",
        "collate": "Padded",
        "budget": {"tokens": 60, "lengths": {"target": "tiny:lengths"}},
        "loader": {"num_workers": 1, "worker_init": "tiny:doubled"},
    },
    "objective": {"losses": {"one": {"target": "CrossEntropyLoss"}, "two": {"target": "MSELoss"}}},
    "optimizer": {"target": "SGD", "groups": [{"match": ["*.bias"], "target": "AdamW"}]},
    "schedule": {"target": "CosineAnnealingLR"},
    "evaluation": {"metrics": {"error": "MeanSquaredError"}},
}
DATA = {"train": {"target": "tiny:points"}, "validation": {"target": "tiny:points"}}
WRONG_TARGET = "{target: 'nothing:There'}"
_TRANSFORMED = f"{{target: 'tiny:points', transform: {WRONG_TARGET}}}"
_IN_SPLIT = "data.split={{validation: 0.1, {}: {}}}"
WRONG = {
    "model": ["model.target=nothing:There"],
    "data.validation.transform": [f"data.validation={_TRANSFORMED}"],
    "data.test.transform": [f"data.test={_TRANSFORMED}"],
    "prediction.data.transform": [f"prediction.data={_TRANSFORMED}"],
    "data.split.transform": ["data.validation=null", _IN_SPLIT.format("transform", WRONG_TARGET)],
    "data.split.stratify": ["data.validation=null", _IN_SPLIT.format("stratify", WRONG_TARGET)],
    "data.split.group": ["data.validation=null", _IN_SPLIT.format("group", WRONG_TARGET)],
    "data.loader.worker_init": ["data.loader.num_workers=1", f"data.loader.worker_init={WRONG_TARGET}"],
    "data.budget.lengths": [f"data.budget={{tokens: 9, lengths: {WRONG_TARGET}}}"],
    "objective.losses.*": [f"objective={{losses: {{one: {WRONG_TARGET}}}}}"],
    "optimizer": ["optimizer.target=nothing:There"],
    "optimizer.groups.*": ["optimizer.groups=[{match: ['*.bias'], target: 'nothing:There'}]"],
    "evaluation.metrics.*": [f"evaluation.metrics={{one: {WRONG_TARGET}}}"],
    "reporting.trackers.*": [f"reporting.trackers=[{WRONG_TARGET}]"],
    "reporting.observers.*": [f"reporting.observers=[{WRONG_TARGET}]"],
}
"""How each key is given a target that is not there; of those that are not named, by the key itself."""


def keys_of_components(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the key of each section with ``target`` and ``args``, as the table writes it."""
    for name, field in section.model_fields.items():
        for inner, star in _sections_in(field.annotation):
            key = f"{prefix}{name}{star}"
            if {"target", "args"} <= set(inner.model_fields):
                yield key
            yield from keys_of_components(inner, f"{key}.")


def _sections_in(annotation: Any, star: str = "") -> Iterator[tuple[type[BaseModel], str]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, star
    many = ".*" if get_origin(annotation) in (list, dict) else star
    for inner in getattr(annotation, "__args__", ()):
        yield from _sections_in(inner, many)


def test_every_section_that_is_a_component_has_a_row_and_every_row_a_section() -> None:
    rows = [row.key for row in TABLE]
    assert sorted(rows) == sorted(set(keys_of_components(RunConfiguration)))


def test_components_are_bound_to_the_keys_they_stand_under(tmp_path: Path) -> None:
    loaded = load(configuration(tmp_path, **ALL))
    components = Components(loaded.values, code=loaded.code, where=loaded.where)
    assert components.of("model").target == "tiny:Mlp"
    assert list(components.below("objective", "losses")) == ["one", "two"]
    assert components.of("optimizer", "groups", "0").key == ("optimizer", "groups", "0")
    assert components.find("objective") is None  # several losses take its place
    assert components.find("data", "test") is None
    assert components.of("data", "budget", "lengths").target == "tiny:lengths"


@pytest.mark.parametrize("key", [row.key for row in TABLE])
def test_what_is_not_there_is_told_by_the_check_with_its_key(tmp_path: Path, key: str) -> None:
    overrides = WRONG.get(key, [f"{key}={WRONG_TARGET}"])
    where = re.sub(r"(groups|trackers|observers)\.\*", r"\1.0", key).replace("*", "one")
    loaded = load(configuration(tmp_path, data=DATA), overrides)
    with pytest.raises(ConfigurationError) as told:
        check_components(loaded)
    assert [problem.key for problem in told.value.problems] == [f"{where}.target"]


def test_a_configuration_holds_nothing_that_was_built_from_it(tmp_path: Path) -> None:
    loaded = load(configuration(tmp_path))
    check_components(loaded)
    before = dict(vars(loaded))
    builder = Builder(loaded)
    assert builder.samples("train", batch_size=4) is not None
    assert vars(loaded) == before
    assert Builder(loaded).sources.get("train") is not builder.sources.get("train")
    assert builder.sources.get("train") is builder.sources.get("train")
