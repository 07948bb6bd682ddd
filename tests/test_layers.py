"""The layers of the design hold, and no module of ours shadows another's."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A module imports only from layers below its own; within a layer, only from those before it in the line.
LAYERS = [
    [
        "errors",
    ],
    [
        "config.signatures",
        "config.component",
        "config.types",
        "config.data",
        "config.yielded_batches",
        "config.learning",
        "config.zero",
        "config.strategy",
        "config.reporting",
        "config.sections",
        "config.yaml_file",
        "config.zero_json",
        "config.zero_rules",
        "config.output_name",
        "config.metric_tasks",
        "config.plain",
        "config.file",
        "config.launcher_table",
        "config.launcher",
        "environment",
        "files",
        "processes.output",
        "processes.open_files",
        "processes.orphans",
        "json_files",
    ],
    [
        "randomness",
        "determinism",
        "processes.stopping",
        "checkpoints.layout",
        "checkpoints.shards",
        "checkpoints.serialization",
        "checkpoints.unfinished",
        "checkpoints.fence",
        "processes.watch",
        "processes.interface",
        "processes.agent",
        "processes.rendezvous",
        "processes.meeting",
        "processes.slurm_step",
    ],
    [
        "data.order",
        "data.splitting",
        "data.sample_values",
        "data.batching",
        "data.collating",
        "data.transforms",
        "data.hugging_face",
        "data.worker_info",
        "data.digests",
        "data.copies",
        "data.samples",
        "data.loading",
        "data.reading_ahead",
        "data.batches",
        "data.fields",
        "data.yielded_batches",
        "data.class_names",
        "model_calls",
        "objective",
        "losses.mismatch",
        "losses.supervised",
        "losses.torch_losses",
        "losses.rows",
        "losses.sample_losses",
        "losses.by_name",
        "losses.focal",
        "losses.pairwise",
        "losses.weighted_sum",
        "optimization.fused",
        "optimization.schedule",
        "optimization.schedulers",
        "optimization.patterns",
        "optimization.freezing",
        "optimization.parameter_groups",
        "optimization.combined",
        "optimization.latecomers",
        "optimization.held_weights",
        "optimization.evaluation_weights",
        "optimization.trial_steps",
        "optimization.rehearsal",
        "optimization.optimizer",
        "optimization.averaging",
        "processes.control",
        "processes.comparison",
        "processes.user_code",
        "training.progress",
        "training.held_buffers",
        "processes.garbage",
    ],
    [
        "data.stream_pieces",
        "data.streams",
        "data.probing",
        "data.stream_comparison",
        "data.stream_windows",
        "data.stream_rounds",
        "data.training_data",
        "strategies",
        "strategies.bare_step",
        "strategies.state_keys",
        "strategies.finite",
        "strategies.mixed_precision",
        "strategies.reduction",
        "strategies.placement",
        "strategies.layouts",
        "strategies.accelerated",
        "processes.examination",
        "strategies.zero_launch",
        "strategies.zero_engine",
        "strategies.zero_optimizers",
        "strategies.zero_state",
        "strategies.zero",
        "strategies.blocks",
        "strategies.state_size",
        "strategies.zero_memory",
        "strategies.memory",
        "strategies.sharded_tensors",
        "strategies.fully_sharded",
        "strategies.factory",
        "training.buffer_values",
        "training.buffer_group",
        "training.still_buffers",
        "training.buffers",
        "evaluation.class_results",
        "evaluation.metric_inputs",
        "evaluation.shared_states",
        "evaluation.metrics",
        "checkpoints.best",
        "checkpoints.attempts",
        "checkpoints.snapshot",
        "checkpoints.sharded_files",
        "checkpoints.together",
        "checkpoints.reading",
        "checkpoints.checkpoint",
        "checkpoints.pretrained",
        "checkpoints.saving",
        "reporting.meters",
        "training.fitting",
    ],
    [
        "training.divergence",
        "training.early_stopping",
        "training.milestones",
        "reporting.stragglers",
        "checkpoints.run_folder",
        "reporting.reporter",
        "reporting.console",
        "evaluation.figures",
        "reporting.wandb_tracker",
        "evaluation.evaluator",
        "optimization.batch_statistics",
        "evaluation.averaged",
        "inference.batch_rows",
        "inference.columns",
        "inference.prediction",
        "inference.predictions_file",
        "inference.submission",
        "training.verdicts",
        "training.loop",
    ],
    [
        "losses.assembly",
        "config.building",
        "data.sources",
        "optimization.assembly",
        "assembly",
        "checkpoints.built",
        "checkpoints.resumption",
        "reporting.facts",
        "reporting.assembly",
        "data_contents",
        "preparation",
        "optimization.curve",
        "checkpoints.inspection",
        "checkpoints.selection",
        "inference.request",
        "checks.data",
        "checks.traces",
        "checks.settings",
        "checks.objective",
        "checks.lone_samples",
        "checks.gradients",
        "checks.evaluation",
        "checks.first_start",
        "checks.attributes",
        "checks.copies",
        "checks.checkpoint",
        "evaluations",
        "inference.on_checkpoint",
        "run_result",
        "state_saver",
        "run",
        "session",
        "describe",
        "show",
        "processes.launching",
        "checkpoints.table",
        "checkpoints.export",
    ],
    [
        "entry",
        "processes.node",
        "submission.options",
        "submission.requeueing",
        "submission.queue",
        "submission.snapshot",
        "submission.slurm",
        "submission.kubernetes",
        "submission.schedulers",
        "train",
        "evaluate",
        "predict",
        "doctor",
        "cli",
    ],
]
APART = ("model_zoo", "data_sources")  # used by name from a YAML; they may import these alone
POSITION = {name: (number, place) for number, layer in enumerate(LAYERS) for place, name in enumerate(layer)}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT / "runtime").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def own_imports(path: Path, package: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == package:
            module = ".".join(node.module.split(".")[1:])
            for alias in node.names:
                is_module = (ROOT / package / Path(*module.split("."), f"{alias.name}.py")).is_file()
                found.add(".".join(filter(None, [module, alias.name])) if is_module else module)
        elif isinstance(node, ast.Import):
            found |= {n.name.partition(".")[2] for n in node.names if n.name.split(".")[0] == package}
    return found - {""}


RUNTIME = sorted(p for p in (ROOT / "runtime").rglob("*.py") if module_name(p))


@pytest.mark.parametrize("path", RUNTIME, ids=module_name)
def test_a_module_imports_only_from_lower_layers(path: Path) -> None:
    name = module_name(path)
    if name.startswith(APART):
        allowed = (*APART, "errors", "environment", "files", "json_files")
        assert all(imported.startswith(allowed) for imported in own_imports(path, "runtime"))
        return
    if path.name == "__init__.py" and not own_imports(path, "runtime") and name not in POSITION:
        return  # a folder's docstring
    assert name in POSITION, f"give {name} its place in LAYERS"
    for imported in own_imports(path, "runtime"):
        assert imported in POSITION, f"{name} imports {imported}, which has no layer"
        assert POSITION[imported] < POSITION[name], f"{name} imports {imported}, which is not below it"


def test_launch_imports_nothing_but_configuration_and_errors() -> None:
    for path in (ROOT / "launch").rglob("*.py"):
        assert all(name == "errors" or name.startswith("config.") for name in own_imports(path, "runtime"))
        assert not {"torch", "accelerate", "numpy"} & imported_packages(path)


def imported_packages(path: Path) -> set[str]:
    tree = ast.walk(ast.parse(path.read_text()))
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
