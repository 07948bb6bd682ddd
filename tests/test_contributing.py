"""CONTRIBUTING.md and the explanations in docs/: what they name is there, and the recipe for a loss works as it is written."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml

from tests.test_launch import clean_environment
from tests.test_layers import APART, LAYERS

ROOT = Path(__file__).parent.parent
GUIDE = (ROOT / "CONTRIBUTING.md").read_text()
PAGES = [ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]
TOPS = "runtime|launch|lockstep|tests|docs|configs|benchmarks|docker|.ci|.github"
MADE_BY_RECIPES = ("runtime/losses/log_cosh.py", "tests/test_log_cosh_loss.py")


def code_block(first_line: str) -> str:
    """Return a block of the guide, which may stand within a list."""
    blocks = re.findall(r"^( *)```python\n(.*?)^ *```", GUIDE, re.M | re.S)
    (found,) = [block for block in map(textwrap.dedent, (b for _, b in blocks)) if block.startswith(first_line)]
    return str(found)


def in_code(text: str) -> set[str]:
    """Return the files and folders that a page names: in backticks, and in drawings."""
    drawn = " ".join(re.findall(r"^```\n(.*?)^```", text, re.M | re.S))
    named = {*re.findall(r"`([\w./-]+)`", text), *re.findall(r"[\w/]+/\w+\.py", drawn)}
    return {name for name in named if "/" in name and (name.endswith(("/", ".py")) or re.match(rf"({TOPS})/", name))}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_are_there(page: Path) -> None:
    missing = {
        name
        for name in in_code(page.read_text()) - {*MADE_BY_RECIPES}
        if not any((ROOT / folder / name).exists() for folder in (".", "runtime", "launch"))
        and (re.match(rf"({TOPS})/", name) or name.partition("/")[0] in {p.name for p in (ROOT / "runtime").iterdir()})
        and not (name.startswith("docs/guides/") and not (ROOT / "docs" / "guides").exists())
    }
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_a_page_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(((?!https?:|#)[^)#\s]+)", page.read_text())
    assert not [link for link in links if not (page.parent / link).exists()]


def test_the_tour_goes_through_every_package_from_the_ground_up() -> None:
    tour = GUIDE.split("## A tour of the code")[1].split("### Where is")[0]
    rows = [line.split("|")[1] for line in tour.splitlines() if line.startswith("| `")]
    named = [match[1] or match[0] for row in rows for match in re.finditer(r"runtime/(\w+)/|launch/", row)]
    order = [name.rstrip("/") for name in named]
    in_layers = [name for name in order if name not in APART]
    assert in_layers == [layer for layer in LAYERS if not layer.startswith("(")]
    assert set(order) >= {path.parent.name for path in (ROOT / "runtime").glob("*/__init__.py")}


def test_the_drawing_of_packages_has_them_all() -> None:
    page = (ROOT / "docs" / "how-it-works.md").read_text()
    for path in (ROOT / "runtime").glob("*/__init__.py"):
        assert f"{path.parent.name}/" in page, path.parent.name


def test_every_decision_is_in_the_index() -> None:
    folder = ROOT / "docs" / "decisions"
    pages = {path.name for path in folder.glob("*.md")} - {"index.md"}
    assert pages == set(re.findall(r"\]\((\w[\w-]*\.md)\)", (folder / "index.md").read_text()))
    for name in pages:
        text = (folder / name).read_text()
        assert [part in text for part in ("**Question.**", "**Answer.**", "## What decided", "## What it costs")] == [
            True
        ] * 4, name


def test_the_forges_file_calls_the_commands_that_people_call() -> None:
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    runs = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert ".ci/run" in runs and os.access(ROOT / ".ci" / "run", os.X_OK)
    targets = {*re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M), "docs"}
    own = [run for run in runs if not run.startswith("git config")]
    assert all(run == ".ci/run" or run.removeprefix("make ") in targets for run in own), own


def test_commits_are_judged_by_the_tools_of_make_lint() -> None:
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert local["repo"] == "local"  # nothing is fetched, so that versions cannot differ
    lint = (ROOT / "Makefile").read_text()
    entries = {hook["id"]: hook["entry"] for hook in local["hooks"]}
    assert entries["ruff"].startswith(".venv/bin/ruff check") and "$(BIN)/ruff check" in lint
    assert entries["ruff-format"].startswith(".venv/bin/ruff format") and "$(BIN)/ruff format" in lint
    assert entries["mypy"] == ".venv/bin/mypy" and "$(BIN)/mypy" in lint


def test_a_loss_that_is_added_by_the_recipe_works(tmp_path: Path) -> None:
    """In a copy of the tree: its file, its row, its test, the layers, and the update on any division of a batch."""
    copy = tmp_path / "copy"
    ignored = shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", ".mypy_cache", ".ruff_cache")
    shutil.copytree(ROOT, copy, ignore=ignored)
    for first_line in ("# runtime/losses/log_cosh.py", "# tests/test_log_cosh_loss.py"):
        (copy / first_line.removeprefix("# ")).write_text(code_block(first_line).split("\n", 1)[1])
    insert(copy, r'add `("[\w.]+")` to `(\w+)` in `([\w./]+)`', GUIDE)
    row = code_block("# a row of TASKS").split("\n", 1)[1]
    grid = copy / "tests" / "test_loss_grid.py"
    grid.write_text(grid.read_text().replace("\nTASKS = [\n", f"\nTASKS = [\n    {row.strip()},\n"))

    files = [f"tests/test_{name}.py" for name in ("log_cosh_loss", "layers", "loss_grid")]
    told = run(copy, "-m", "pytest", "-rA", "-p", "no:cacheprovider", *files, "-k", "log_cosh or 1-4-None")
    for passed in (
        "test_log_cosh_loss_is_its_formula",
        "[runtime.losses.log_cosh]",
        "test_the_update_is_that_of_torchs_mean",
    ):
        assert re.search(rf"^PASSED .*{re.escape(passed)}", told, re.M), told[-3000:]
    trained = run(copy, "-c", TRAINED.format(folder=str(tmp_path / "run")))
    assert trained.splitlines()[-1] == "finished 3"
    ruff = Path(sys.executable).with_name("ruff")
    if ruff.exists():
        written = ["runtime/losses/log_cosh.py", "tests/test_log_cosh_loss.py"]
        subprocess.run([ruff, "check", "-q", *written], cwd=copy, check=True)
        subprocess.run([ruff, "format", "-q", "--check", *written], cwd=copy, check=True)


TRAINED = """
import lockstep, runtime
assert runtime.__file__.startswith({folder!r}.rsplit("/", 1)[0]), runtime.__file__
result = lockstep.train({{
    "model": {{"target": "MLP", "args": {{"in_features": 10, "hidden": [4], "out_features": 1}}}},
    "data": {{"train": {{"target": "diabetes", "args": {{"split": "train"}}}}}},
    "batch": {{"global_size": 16}},
    "objective": {{"target": "LogCoshLoss", "args": {{"scale": 2.0}}}},
    "optimizer": {{"target": "SGD", "args": {{"lr": 0.01}}}},
    "limit": {{"steps": 3}},
    "output": {folder!r},
    "reporting": {{"progress": False}},
}})
print(result.outcome, result.step)
"""


def insert(copy: Path, pattern: str, text: str) -> None:
    """Put a value into a tuple as the guide says: value, name of the tuple, file."""
    (value, name, file), *others = re.findall(pattern, text)
    assert not others
    before = (copy / file).read_text()
    after = re.sub(rf"^({name}\b[^=]*= \()", rf"\g<1>{value}, ", before, count=1, flags=re.M)
    assert after != before, f"there is no {name} in {file}"
    (copy / file).write_text(after)


def run(copy: Path, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, *words],
        cwd=copy,
        env=clean_environment(PYTHONPATH=str(copy), OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout
