"""The layers of the design hold, and no module of ours shadows another's."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From the ground up: a package imports only from those before it. A name in brackets is a module of its own.
LAYERS = [
    "(errors)",
    "(run_files)",
    "(wording)",
    "config",
    "(arguments)",
    "(output)",
    "(messages)",
    "(json_files)",
    "(environment)",
    "(open_files)",
    "(guarded)",
    "(code_digests)",
    "(determinism)",
    "(exact_sum)",
    "(randomness)",
    "state",
    "(model_calls)",
    "distributed",
    "data",
    "(objective)",
    "optimization",
    "strategies",
    "losses",
    "evaluation",
    "reporting",
    "training",
    "(files)",
    "checkpoints",
    "build",
    "(outcome)",
    "launch",
    "inference",
    "checks",
    "commands",
    "(cli)",
    "run",
    "(session)",
    "(launched)",
    "(worker)",
]
DOORS = ("train", "evaluate", "predict", "doctor")
APART = ("model_zoo", "data_sources")  # used by name from a YAML; they may import these alone
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in ("runtime", "launch")
    for path in sorted((ROOT / folder).rglob("*.py"))
}


def layer_of(module: str) -> str:
    """Return a module's package, or its own name in brackets where it stands alone."""
    top, *rest = module.split(".")
    if top == "launch":
        return top
    return rest[0] if (ROOT / top / rest[0]).is_dir() else f"({rest[0]})"


def own_imports(module: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {
                inner if (inner := f"{node.module}.{alias.name}") in MODULES else node.module for alias in node.names
            }
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
    return {name for name in found if name in MODULES and name != "runtime"}


@pytest.mark.parametrize("module", [name for name in MODULES if name != "runtime"])
def test_a_package_imports_only_from_those_below_it(module: str) -> None:
    layer = layer_of(module)
    if layer in APART:
        allowed = {*APART, "(errors)", "(wording)", "(randomness)", "(environment)", "(files)", "(json_files)"}
        assert {layer_of(imported) for imported in own_imports(module)} <= allowed
        return
    if layer.strip("()") in DOORS:
        assert not own_imports(module)
        return
    assert layer in LAYERS, f"give {layer} its place in LAYERS"
    for imported in own_imports(module):
        assert layer_of(imported) in LAYERS[: LAYERS.index(layer) + 1], (
            f"{module} imports {imported}, which is not below it"
        )


def test_no_module_imports_itself_through_others() -> None:
    graph = TopologicalSorter({module: own_imports(module) for module in MODULES})
    graph.prepare()  # raises CycleError, which names the modules


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("launch.") and name != "launch.agent"])
def test_what_renders_a_launch_imports_nothing_heavy(module: str) -> None:
    """Job scripts, manifests and command lines are also written where torch is not installed."""
    assert not {"torch", "accelerate", "numpy"} & imported_packages(MODULES[module], lazily=module == "launch.local")


def imported_packages(path: Path, *, lazily: bool) -> set[str]:
    """Return the packages that a module imports: all, or without those that its functions import."""
    tree = ast.parse(path.read_text()).body if lazily else ast.walk(ast.parse(path.read_text()))
    names = [
        n.module or "" if isinstance(n, ast.ImportFrom) else n.names[0].name
        for n in tree
        if isinstance(n, ast.Import | ast.ImportFrom)
    ]
    return {name.split(".")[0] for name in names}


def test_no_module_bears_a_name_of_the_standard_library() -> None:
    ours = {path.stem for folder in ("runtime", "launch") for path in (ROOT / folder).glob("*.py")} - {"__init__"}
    ours |= {path.name for path in (ROOT / "runtime").iterdir() if path.is_dir()}
    assert not ours & set(sys.stdlib_module_names)


@pytest.mark.parametrize("act", ["train", "evaluate", "predict", "doctor"])
def test_an_entry_point_takes_its_own_folder_off_the_path_before_it_imports_anything(tmp_path: Path, act: str) -> None:
    """Modules of ours that bear a dependency's name would otherwise be imported in its place."""
    probe = (
        f"import runpy, sys; sys.argv = ['{act}.py', '--help']\n"
        f"sys.path.insert(0, {str(ROOT / 'runtime')!r})\n"
        f"try: runpy.run_path(sys.path[0] + '/{act}.py', run_name='__main__')\n"
        "except SystemExit: pass\n"
        f"assert {str(ROOT / 'runtime')!r} not in sys.path, sys.path\n"
        "from importlib.util import find_spec\n"
        "assert not find_spec('predict') and 'runtime' not in str(find_spec('evaluate'))\n"
        "import runtime; print(runtime.__doc__)"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("Lockstep")


def test_another_package_called_runtime_is_named(tmp_path: Path) -> None:
    (tmp_path / "runtime").mkdir()
    (tmp_path / "runtime" / "__init__.py").write_text('"""Somebody else."""')
    done = subprocess.run(
        [sys.executable, str(ROOT / "runtime" / "train.py"), "x.yaml"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert str(tmp_path) in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "module",
    [
        "runtime.config.file",
        "runtime.config.component",
        "runtime.cli",
        "runtime.distributed.stopping",
        "launch.accelerate_command",
    ],
)
def test_what_a_login_node_needs_imports_no_torch(module: str) -> None:
    code = f"import {module}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_training_without_metrics_imports_no_torchmetrics() -> None:
    code = "import runtime.run.run, sys; sys.exit('torchmetrics' in sys.modules or 'wandb' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
