"""The commands, code and configurations of README and docs/ work as written."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from runtime.arguments import parsed
from runtime.build.builder import Builder
from runtime.build.components import check_components
from runtime.cli import _parser
from runtime.config.file import load
from runtime.config.sections import RunConfiguration
from tests.documentation import PAGES as ALL_PAGES
from tests.documentation import ROOT, Block, all_blocks, blocks, commands, environment, files, page_name, sections

PAGES = [pytest.param(page, id=page_name(page)) for page in ALL_PAGES]
README = ROOT / "README.md"
GUIDES = ROOT / "docs" / "guides"
BASE = {
    "model": {"target": "MLP", "args": {"in_features": 64, "hidden": [8], "out_features": 10}},
    "data": {split: {"target": "digits", "args": {"split": split}} for split in ("train", "validation")},
    "batch": {"global_size": 16, "micro_size": 4},
    "objective": "CrossEntropyLoss",
    "optimizer": {"target": "SGD", "args": {"lr": 0.1}},
    "limit": {"epochs": 200},
}
QUICK = ("lockstep describe", "lockstep show", "lockstep submit", "lockstep schema")


def load_sections(given: dict[str, Any], folder: Path) -> Any:
    """Load a configuration of which a page shows these sections."""
    whole = {"model", "data", "optimizer"} <= given.keys()
    data = {} if whole or "data" not in given else {"data": BASE["data"] | given["data"]}
    path = folder / "page.yaml"
    path.write_text(yaml.safe_dump((BASE if not whole else {}) | given | data))
    return load(path)


@pytest.mark.parametrize("page", PAGES)
def test_every_yaml_is_a_valid_configuration(tmp_path: Path, page: Path) -> None:
    for block in blocks(page, "yaml"):
        for given in sections(block.text):
            load_sections(given, tmp_path)


def test_a_yaml_with_every_section_is_shown() -> None:
    (block,) = [b for b in blocks(ROOT / "docs" / "start.md", "yaml") if b.text.startswith("# yaml-language-server")]
    assert set(RunConfiguration.model_fields) == set(yaml.safe_load(block.text))


def test_schedules_and_averages_of_the_guide_can_be_built(tmp_path: Path) -> None:
    pieces = [given for block in blocks(GUIDES / "schedules.md", "yaml") for given in sections(block.text)]
    assert len(pieces) == 7
    for given in pieces:
        loaded = load_sections(given, tmp_path)
        if loaded.values.schedule is not None and loaded.values.schedule.target != "LambdaLR":  # the reader's function
            check_components(loaded)


def test_metrics_of_the_guide_can_be_built(tmp_path: Path) -> None:
    (tmp_path / "metrics.py").write_text("from torchmetrics import MeanMetric\n\nclass Lift(MeanMetric):\n    pass\n")
    given = yaml.safe_load(files(GUIDES / "metrics.md")["metrics.yaml"])
    given["data"] |= {split: {"target": "digits", "args": {"split": split}} for split in ("train", "validation")}
    loaded = load_sections(given, tmp_path)
    check_components(loaded)
    assert set(Builder(loaded).metrics()) == {"top5", "f1", "confusion", "auroc", "rmse", "ndcg", "own"}


def test_several_losses_of_the_guide_train_as_written(tmp_path: Path) -> None:
    """Against each loss by hand, divided by the trust of what it counts."""
    from torch.nn.functional import cross_entropy

    from lockstep import train

    for name, text in files(GUIDES / "losses.md").items():
        (tmp_path / name).write_text(text)
    changes = ("optimizer.args.lr=0.0", "limit.steps=1", "reporting={every: 1 step, progress: false}")
    result = train(tmp_path / "two_heads.yaml", f"output={tmp_path}/run", *changes)
    lines = (result.folder / "metrics.jsonl").read_text().splitlines()
    (told,) = [record for record in map(json.loads, lines) if record["event"] == "train"]
    samples = sys.modules["mine"].sentences()
    whole = {name: torch.stack([torch.as_tensor(sample[name]) for sample in samples]) for name in samples[0]}
    with torch.no_grad():
        output = result.model(whole["input_ids"], whole["attention_mask"])
    words = cross_entropy(output["words"].flatten(0, 1), whole["labels"].flatten(), reduction="none").view(12, 5)
    order = cross_entropy(output["order"], whole["follows"], reduction="none")
    trust = whole["trust"]
    expected = [float((words * trust[:, None]).sum() / (5 * trust.sum())), float((order * trust).sum() / trust.sum())]
    assert [told["words"], told["order"]] == pytest.approx(expected, rel=1e-5)
    assert told["loss"] == pytest.approx(expected[0] + 0.5 * expected[1], rel=1e-5)


def test_the_readmes_own_project_trains_from_its_own_folder(tmp_path: Path) -> None:
    shown = files(README)
    for name, text in shown.items():
        (tmp_path / name).write_text(text)
    assert len([line for line in shown["spiral.py"].splitlines()[1:] if line.strip()]) <= 20
    options: dict[str, Any] = {"cwd": tmp_path, "env": environment(), "capture_output": True, "text": True}
    first = subprocess.run(["lockstep", "train", "spiral.yaml", "--processes", "2"], check=False, **options)
    assert first.returncode == 0, first.stderr
    second = subprocess.run([sys.executable, "train_spiral.py"], check=False, **options)
    assert second.returncode == 0, second.stderr
    outcome, step, loss = second.stdout.splitlines()[-1].split()
    assert (outcome, step) == ("finished", "240")
    assert float(loss) < 0.3
    records = [json.loads(line) for line in (tmp_path / "runs" / "spiral" / "metrics.jsonl").read_text().splitlines()]
    assert [r["world_size"] for r in records if r["event"] == "start"] == [2, 1]


@pytest.mark.parametrize("block", all_blocks("python"), ids=lambda block: f"{page_name(block.page)}:{block.file_name}")
def test_every_code_block_runs_or_is_a_file_and_imports_public_names_only(tmp_path: Path, block: Block) -> None:
    """A file is run by the commands of its page, or is what its page's YAML names."""
    assert not re.search(r"^\s*(from|import) (runtime|launch)\b", block.text, re.M)
    if block.file_name is not None:
        compile(block.text, block.file_name, "exec")
    else:
        subprocess.run([sys.executable, "-c", block.text], cwd=tmp_path, env=environment(), check=True)


def test_a_file_that_two_pages_show_is_the_same_on_both() -> None:
    seen: dict[str, str] = {}
    for page in ALL_PAGES:
        for name, text in files(page).items():
            assert seen.setdefault(name, text) == text, f"{name} in {page_name(page)}"


def heading_ids(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as Python-Markdown and GitHub make them of plain headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.S), re.M)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_page_or_heading(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        if (
            anchor
            and target.suffix == ".md"
            and not re.search(rf'(name|id)="{anchor}"|#{anchor}\b', target.read_text())
        ):
            assert anchor in heading_ids(target), link


def test_every_page_is_in_the_sites_menu() -> None:
    menu = re.findall(r"^ +- (?:[\w ]+: )?([\w/-]+\.md)$", (ROOT / "docs" / "mkdocs.yml").read_text(), re.M)
    pages = {str(page.relative_to(ROOT / "docs")) for page in ALL_PAGES if page != README}
    assert sorted(menu) == sorted(pages)


def test_the_readme_is_short_and_lists_the_folders_there_are() -> None:
    text = README.read_text()
    assert len(text.splitlines()) <= 200
    tree = text[text.index("## Folders") :]
    names = {path.name for path in (ROOT / "runtime").iterdir() if path.suffix == ".py"} - {"__init__.py"}
    names |= {f"{path.parent.name}/" for path in (ROOT / "runtime").glob("*/__init__.py")}
    assert names <= set(re.findall(r"[a-z_]+(?:\.py|/)", tree))
    there = {path.name for path in (ROOT / "runtime").rglob("*.py")}
    assert set(re.findall(r"[a-z_]+\.py", tree)) <= there


@pytest.mark.parametrize("block", all_blocks("sh"), ids=lambda block: page_name(block.page))
def test_commands_for_a_cluster_are_ones_that_the_shell_and_lockstep_accept(block: Block) -> None:
    assert subprocess.run(["bash", "-n"], input=block.text, text=True, check=False).returncode == 0
    for line in block.text.splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["lockstep"]:
            given = words[words.index("lockstep") + 1 :]
            parsed(_parser(given[0]), given)


@pytest.mark.parametrize("page", PAGES)
def test_make_has_every_target_that_a_page_names(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    named = re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text(), re.M)
    assert all(re.search(rf"^{target}:", makefile, re.M) for target in named), named


def quick() -> list[str]:
    lines = dict.fromkeys(line for page in ALL_PAGES for line in commands(page) if line.startswith(QUICK))
    return [line for line in lines if "--curve" not in line and not re.search(r" (?!configs/)[\w-]+\.yaml", line)]


@pytest.mark.parametrize("line", quick())
def test_a_command_that_trains_nothing_runs_as_written(line: str) -> None:
    done = subprocess.run(line, shell=True, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if line.startswith("lockstep show configs/digits.yaml --processes 2"):
        for expected in (
            "K = 4",
            "1, 2, 4 divide K",
            "23 per epoch, 460 in all",
            "94,186 trainable",
            "dropout",
            "Adam",
        ):
            assert expected in done.stdout, expected


@pytest.mark.long
@pytest.mark.parametrize("page", [pytest.param(page, id=page_name(page)) for page in ALL_PAGES if commands(page)])
def test_every_command_of_a_page_runs_as_written(tmp_path: Path, page: Path) -> None:
    checkout = tmp_path / "checkout"
    ignored = shutil.ignore_patterns(".git", ".venv", "runs", "build", "__pycache__")
    shutil.copytree(ROOT, checkout, ignore=ignored)
    for name, text in files(page).items():
        (checkout / name).write_text(text)
    for line in commands(page):
        done = subprocess.run(
            line, shell=True, cwd=checkout, env=environment(), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{line}\n{done.stderr}"
    if page == README:
        lines = (checkout / "runs" / "digits" / "metrics.jsonl").read_text().splitlines()
        records = [record for record in map(json.loads, lines) if record["event"] == "evaluation"]
        assert records[-1]["accuracy"] >= 0.97
