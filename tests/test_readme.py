"""The README's commands and code run as written."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from runtime.config.file import load
from tests.test_launch import clean_environment

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def block(language: str, first_line: str) -> str:
    (found,) = [b for b in re.findall(rf"```{language}\n(.*?)```", README, re.S) if b.startswith(first_line)]
    return found


def commands() -> list[str]:
    lines = [line for b in re.findall(r"```console\n(.*?)```", README, re.S) for line in b.splitlines()]
    return [line for line in lines if not line.startswith("make ")]


def environment() -> dict[str, str]:
    return clean_environment(PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


def test_the_yaml_page_is_a_valid_configuration(tmp_path: Path) -> None:
    path = tmp_path / "page.yaml"
    path.write_text(block("yaml", "# yaml-language-server"))
    loaded = load(path)
    assert loaded.values.batch.global_size == 64


def test_the_yaml_page_names_every_top_level_key() -> None:
    from runtime.config.sections import RunConfiguration

    page = block("yaml", "# yaml-language-server")
    for key in RunConfiguration.model_fields:
        assert re.search(rf"^{key}:", page, re.M), key


def test_a_users_own_project_trains_from_its_own_folder(tmp_path: Path) -> None:
    for language, name in (("python", "spiral.py"), ("yaml", "spiral.yaml"), ("python", "train_spiral.py")):
        (tmp_path / name).write_text(block(language, f"# {name}"))
    code_lines = [line for line in block("python", "# spiral.py").splitlines()[1:] if line.strip()]
    assert len(code_lines) <= 25
    options = {"cwd": tmp_path, "env": environment(), "capture_output": True, "text": True}
    first = subprocess.run(["lockstep", "train", "spiral.yaml", "--processes", "2"], check=False, **options)
    assert first.returncode == 0, first.stderr
    second = subprocess.run([sys.executable, "train_spiral.py"], check=False, **options)
    assert second.returncode == 0, second.stderr
    outcome, step, loss = second.stdout.splitlines()[-1].split()
    assert (outcome, step) == ("finished", "240")
    assert float(loss) < 0.3
    records = [json.loads(line) for line in (tmp_path / "runs" / "spiral" / "metrics.jsonl").read_text().splitlines()]
    assert [r["world_size"] for r in records if r["event"] == "start"] == [2, 1]


MINE = """
import torch
from torch import nn

class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.words, self.order = nn.Embedding(9, 4), nn.Linear(4, 9), nn.Linear(4, 2)
    def forward(self, input_ids, attention_mask):
        hidden = self.embedding(input_ids) * attention_mask.unsqueeze(-1)
        return {"words": self.words(hidden), "order": self.order(hidden.mean(1))}

def sentences():
    ids = torch.arange(60).view(12, 5) % 9
    return [
        {"input_ids": row, "attention_mask": torch.ones(5), "labels": (row + 1) % 9, "follows": n % 2, "trust": 1.0 + n % 3}
        for n, row in enumerate(ids)
    ]
"""


def test_several_losses_train_as_written(tmp_path: Path) -> None:
    """Against each loss by hand, divided by the trust of what it counts."""
    from torch.nn.functional import cross_entropy

    from runtime.session import train

    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "losses.yaml").write_text(
        block("yaml", 'model: "mine:TwoHeads"')
        + "batch: {global_size: 12, micro_size: 5}\noptimizer: {target: SGD, args: {lr: 0.0}}\nlimit: {steps: 1}\n"
        + "reporting: {every: 1 step, progress: false}\n"
    )
    result = train(tmp_path / "losses.yaml", f"output={tmp_path}/run")
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


def test_the_metrics_are_built_as_written(tmp_path: Path) -> None:
    from runtime.build import components

    (tmp_path / "metrics.py").write_text("from torchmetrics import MeanMetric\n\nclass Lift(MeanMetric):\n    pass\n")
    text = block("yaml", "data:\n  fields: {group: query}")
    digits = "{{target: digits, args: {{split: {}}}}}"
    path = tmp_path / "metrics.yaml"
    path.write_text(
        text.replace(
            "data:\n", f"data:\n  train: {digits.format('train')}\n  validation: {digits.format('validation')}\n"
        )
        + "model: {target: MLP, args: {in_features: 64, hidden: [8], out_features: 10}}\nbatch: {global_size: 16}\n"
        + "objective: CrossEntropyLoss\noptimizer: {target: SGD, args: {lr: 0.1}}\n"
    )
    loaded = load(path)
    components.check_components(loaded)
    assert set(components.build_metrics(loaded)) == {"top5", "f1", "confusion", "auroc", "rmse", "ndcg", "own"}


def test_the_files_that_the_readme_lists_are_the_files_there_are() -> None:
    tree = README[README.index("## Files") :]
    names = {path.name for path in (ROOT / "runtime").iterdir() if path.suffix == ".py"} - {"__init__.py"}
    names |= {f"{path.parent.name}/" for path in (ROOT / "runtime").glob("*/__init__.py")}
    assert names <= set(re.findall(r"[a-z_]+(?:\.py|/)", tree))
    there = {path.name for folder in ("runtime", "launch", "tests") for path in (ROOT / folder).rglob("*.py")}
    assert set(re.findall(r"[a-z_]+\.py", tree)) <= there


def test_lockstep_show_runs_as_written(tmp_path: Path) -> None:
    (line,) = [line for line in commands() if line.startswith("lockstep show")]
    done = subprocess.run(line, shell=True, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for expected in ("K = 4", "1, 2, 4 divide K", "23 per epoch, 460 in all", "94,186 trainable", "dropout", "Adam"):
        assert expected in done.stdout, expected


@pytest.mark.long
def test_every_command_runs_as_written(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    shutil.copytree(ROOT, checkout, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__"))
    assert len(commands()) >= 5
    for line in commands():
        done = subprocess.run(
            line, shell=True, cwd=checkout, env=environment(), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{line}\n{done.stderr}"
    accuracies = [
        record["accuracy"]
        for record in map(json.loads, (checkout / "runs" / "digits" / "metrics.jsonl").read_text().splitlines())
        if record["event"] == "evaluation"
    ]
    assert accuracies[-1] >= 0.97
