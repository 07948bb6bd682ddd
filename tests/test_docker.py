"""What can be told of the images without building them; `make image-test` builds one and runs it."""

from __future__ import annotations

import fnmatch
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from launch import node
from runtime.arguments import parsed
from runtime.config.file import load
from tests.test_kubernetes import tool

ROOT = Path(__file__).parent.parent
DOCKERFILES = [ROOT / "docker" / name for name in ("Dockerfile", "Dockerfile.cpu")]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint_has_nothing_to_say(path: Path) -> None:
    done = subprocess.run([tool("hadolint"), str(path)], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_what_an_image_is_made_of_is_sent_to_the_build_and_nothing_else(path: Path) -> None:
    copied = [
        word for words in re.findall(r"^COPY (?!--from)(.*) \S+$", path.read_text(), re.M) for word in words.split()
    ]
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert rules[0] == "*"
    wanted = {word for word in copied if not word.startswith("--")}
    assert {rule[1:] for rule in rules if rule[0] == "!"} == wanted
    assert all((ROOT / word).exists() for word in wanted)
    assert any(fnmatch.fnmatch("runtime/__pycache__", rule.replace("**", "*")) for rule in rules[1:])


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_every_package_of_the_distribution_is_in_an_image(path: Path) -> None:
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["include"]
    for package in (name.rstrip("*") for name in packages):
        assert f"COPY {package} {package}\n" in path.read_text()


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_is_pinned_and_its_processes_are_nobodys_root(path: Path) -> None:
    text = path.read_text()
    *_, last = text.split("\nFROM ")
    assert re.search(r"^ARG BASE=\S+:\d+\.\d+\.\d+-\S+$", text, re.M)  # a release, not what is newest today
    assert re.findall(r"^USER (.*)$", last, re.M) == ["1000:1000"]
    assert 'ENTRYPOINT ["tini", "--"]' in last
    assert "PYTHONSAFEPATH=1" in last
    assert text.count("--constraint constraints.txt") == text.count("pip install") == 2


def test_the_two_machines_of_compose_are_started_alike_and_with_time_to_save() -> None:
    composed = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
    loaded = load(ROOT / "configs" / "digits.yaml")
    asked = []
    for name, service in composed["services"].items():
        *program, config, rest = service["command"].split(maxsplit=4)
        assert program == ["python", "-m", "launch.node"]
        options = vars(parsed(node._parser(), [config, *rest.split()]))
        asked.append({key: value for key, value in options.items() if key != "node_rank"})
        assert name == f"node-{options['node_rank']}"
        assert options["main_address"] == "node-0"
        assert options["nodes"] == len(composed["services"])
        assert int(service["stop_grace_period"].removesuffix("s")) >= 2 * loaded.values.limit.grace_seconds
        assert service["volumes"] == ["runs:/workspace/runs"]
        assert service["build"]["dockerfile"] == "docker/Dockerfile.cpu"
    assert len(asked) == 2
    assert asked[0] == asked[1]
