"""Code that changed between two starts of a run is told by its files; a finished run does not pass old results off as new."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from runtime import code_digests as user_code

pytestmark = pytest.mark.single
NET = """
import torch
from layers.inner.block import block


def net():
    return torch.nn.Sequential(block(), torch.nn.Linear(6, 3))
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    code = tmp_path / "code"
    (code / "layers" / "inner").mkdir(parents=True)
    for folder in (code / "layers", code / "layers" / "inner"):
        (folder / "__init__.py").touch()
    (code / "net.py").write_text(NET)
    (code / "layers" / "inner" / "block.py").write_text(
        "import torch\n\n\ndef block():\n    return torch.nn.Linear(8, 6)\n"
    )
    (code / "unused.py").write_text("1\n")
    tiny = Path(__file__).parent / "project" / "tiny.py"
    (code / "points.py").write_text(tiny.read_text())
    (code / "c.yaml").write_text(
        "model: net:net\ndata: {train: {target: 'points:points', args: {dtype: float32}}}\nbatch: {global_size: 16}\n"
        "objective: CrossEntropyLoss\noptimizer: {target: SGD, args: {lr: 0.1}}\nlimit: {epochs: 1}\noutput: ../run\n"
        "evaluation: {every: 1 epoch}\nreporting: {progress: false}\n"
    )
    return code


def train(project: Path, *overrides: str, succeeds: bool = True) -> str:
    """Train in a new interpreter, which alone reads a module anew."""
    script = "import sys; from runtime.session import train; train(*sys.argv[1:])"
    told = subprocess.run(
        [sys.executable, "-c", script, str(project / "c.yaml"), *overrides],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        cwd=project,
        capture_output=True,
        text=True,
        check=succeeds,
    )
    return told.stdout + told.stderr


def test_a_changed_module_of_a_sub_package_is_named(project: Path) -> None:
    assert "code" not in train(project).partition("memory")[2]
    assert "warning" not in train(project)
    block = project / "layers" / "inner" / "block.py"
    block.write_text(block.read_text() + "\n# another\n")
    (project / "unused.py").write_text("2\n")
    finished = train(project)
    assert (
        "the code is not what this run was trained with: layers/inner/block.py has changed. Its results are" in finished
    )
    assert "unused.py" not in finished
    continued = train(project, "limit.epochs=2")
    assert "the code has changed since the checkpoint: layers/inner/block.py has changed. From here on" in continued
    assert "warning" not in train(project, "limit.epochs=3")
    block.write_text(
        block.read_text().replace("return torch.nn.Linear(8, 6)", "return torch.nn.Sequential(torch.nn.Linear(8, 6))")
    )
    misfit = train(project, "limit.epochs=4", succeeds=False)
    assert "The code has changed since the checkpoint: layers/inner/block.py has changed\n" in misfit


@pytest.mark.parametrize("name", ["fast.so", "fast.pyc", "fast.cpython-311-x86_64-linux-gnu.so"])
def test_a_changed_extension_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(user_code, "_SUFFIXES", (*user_code._SUFFIXES, ".cpython-311-x86_64-linux-gnu.so"))
    module = ModuleType("fast")
    module.__file__ = str(tmp_path / name)
    monkeypatch.setitem(sys.modules, "fast", module)
    (tmp_path / name).write_bytes(b"one")
    before = user_code.loaded_code(tmp_path, {})
    monkeypatch.setattr(user_code, "_first_seen", {})  # another start
    (tmp_path / name).write_bytes(b"two")
    assert user_code.changes_of(before, tmp_path, {}) == [f"{name} has changed"]
