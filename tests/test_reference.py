"""The page of all keys, ``docs/reference/configuration.md``: whole, right, and what the sections say."""

from __future__ import annotations

import re
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import pytest
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from runtime.cli import main
from runtime.config.file import exact_keys
from runtime.config.reference import anchor
from runtime.config.sections import RunConfiguration

PAGE = Path(__file__).parent.parent / "docs" / "reference" / "configuration.md"
TEXT = PAGE.read_text()


def entries() -> dict[str, tuple[list[str], str]]:
    """Return facts and description of each key, by its path in the YAML; of sections that recur, at their first place."""
    found = {}
    for part in TEXT.split("\n## ")[1:]:
        heading, *_ = part.splitlines()
        path = "" if heading == "Top level" else f"{heading.strip('`')}."
        for key, facts, description in re.findall(r"^- \*\*`(\w+)`\*\* · (.*)<br>\n  (.*)$", part, re.M):
            found[path + key] = (facts.split(" · "), description)
    return found


def sections(annotation: Any) -> list[tuple[str, type[BaseModel]]]:
    """Return the sections that a key may hold, and what follows the key in their path."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [("", annotation)]
    suffix = {list: "[]", dict: ".NAME"}.get(get_origin(annotation), "")
    assert suffix or get_origin(annotation) in (None, Union, UnionType) or get_args(annotation)
    return [(suffix + inner, section) for part in get_args(annotation) for inner, section in sections(part)]


def walked(section: type[BaseModel] = RunConfiguration, path: str = "") -> list[tuple[str, type[BaseModel], str]]:
    """Return every key of every section by the place where the YAML first has the section."""
    seen: set[type[BaseModel]] = set()

    def walk(section: type[BaseModel], path: str) -> Any:
        seen.add(section)
        for key, field in section.model_fields.items():
            yield path + key, section, key
            for suffix, inner in sections(field.annotation):
                if inner not in seen and inner.__name__ != "ComponentSection":
                    yield from walk(inner, f"{path}{key}{suffix}.")

    return list(walk(section, path))


def test_the_page_is_what_lockstep_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema", "--markdown"]) == 0
    assert capsys.readouterr().out == TEXT, "run: lockstep schema --markdown > docs/reference/configuration.md"


def test_every_key_is_there_and_described() -> None:
    keys = {path for path, _, _ in walked()} | {"Components.target", "Components.args"}
    assert keys == set(entries())
    assert all(description for _, description in entries().values())


def test_every_default_is_that_of_its_section() -> None:
    for path, section, key in walked():
        facts, _ = entries()[path]
        shown = [fact.removeprefix("default ").strip("`") for fact in facts if fact.startswith("default ")]
        assert ("*required*" in facts) == section.model_fields[key].is_required(), path
        default = section.model_fields[key].get_default(call_default_factory=True)
        if default is PydanticUndefined or default is None or isinstance(default, BaseModel):
            assert not shown, path
        elif isinstance(default, bool):
            assert shown == ["true" if default else "false"], path
        elif isinstance(default, int | float):
            assert [float(text) for text in shown] == [default], path
        else:
            assert shown == [str(default)], path


def test_what_may_change_is_what_resuming_compares_not() -> None:
    """A key that a resumed run compares with the interrupted one's is exact."""
    compared = 0
    for path, (facts, _) in entries().items():
        if "[]" in path or "NAME" in path or not {"*free*", "*exact*"} & set(facts):
            continue
        nested: Any = 1
        for key in reversed(path.split(".")):
            nested = {key: nested}
        assert bool(exact_keys(nested)) == ("*exact*" in facts), path
        compared += 1
    assert compared > 100


def test_links_lead_to_headings() -> None:
    headings = {anchor(heading) for heading in re.findall(r"^#+ (.*)$", TEXT, re.M)}
    assert set(re.findall(r"\]\(#([^)]*)\)", TEXT)) <= headings
