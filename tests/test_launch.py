"""Real launches: the lines that work, and the silent traps of ``accelerate launch``, each of which is refused."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.accelerate_command import command, environment
from launch.job import JobSpec
from launch.local import num_threads
from runtime.environment import check_world_size, requested_world_size
from runtime.errors import WorldSizeError
from tests.observed import configuration

ROOT = Path(__file__).parent.parent
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--mixed_precision", "no", "--dynamo_backend", "no"]


def clean_environment(**added: str) -> dict[str, str]:
    """The environment of a user's shell on a machine without GPUs."""
    unwanted = ("ACCELERATE_", "WORLD_SIZE", "RANK", "LOCAL_", "MASTER_", "LOCKSTEP_")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(unwanted)}
    return {**kept, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **added}


def written(folder: Path, **changes: Any) -> Path:
    config = configuration(folder / "run", **changes)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def run(line: list[str], **added: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        line, env=clean_environment(**added), capture_output=True, text=True, timeout=120, check=False, cwd="/"
    )


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("flags", "added"),
    [
        (["--num_processes", "2", "--num_machines", "1"], {}),
        (["--cpu", "--num_processes", "2", "--num_machines", "1"], {}),
        (
            [
                "--cpu",
                "--num_machines",
                "2",
                "--num_processes",
                "2",
                "--machine_rank",
                "0",
                "--main_process_ip",
                "127.0.0.1",
                "--main_process_port",
                "29507",
            ],
            {},
        ),
        (["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"], {}),
        (["--num_processes", "1", "--num_machines", "1"], {"LOCKSTEP_WORLD_SIZE": "2"}),
    ],
    ids=["no flag", "cpu", "cpu on two machines", "multi_gpu without GPUs", "fewer than lockstep asked for"],
)
def test_processes_that_would_each_train_alone_are_refused(
    tmp_path: Path, flags: list[str], added: dict[str, str]
) -> None:
    done = run([*ACCELERATE, *flags, str(ROOT / "runtime" / "train.py"), str(written(tmp_path))], **added)
    assert done.returncode != 0
    assert "lockstep: " in done.stderr
    assert "asked for" in done.stderr
    assert "--processes N" in done.stderr
    assert not (tmp_path / "run").exists()


def test_accelerate_launch_with_two_processes_trains_one_model(tmp_path: Path) -> None:
    path = written(tmp_path)
    flags = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"]
    train = str(ROOT / "runtime" / "train.py")
    done = run([*ACCELERATE, *flags, train, str(path), "limit.steps=3"], ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr
    first, *_ = records(tmp_path)
    assert (first["event"], first["world_size"], first["slots"]) == ("start", 2, 4)
    assert [r["step"] for r in records(tmp_path) if r["event"] == "train"] == [1, 2, 3]


@pytest.mark.long
def test_torchrun_on_two_machines_trains_what_two_processes_of_one_do(tmp_path: Path) -> None:
    """Two agents that know each other by address and port only, here both on the loopback."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    one = run([sys.executable, "-m", "runtime.cli", "train", str(written(here)), "--processes", "2"])
    assert one.returncode == 0, one.stderr
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = ["--nnodes", "2", "--nproc_per_node", "1", "--master_addr", "127.0.0.1", "--master_port", port]
    train = [str(ROOT / "runtime" / "train.py"), str(written(there))]
    agents = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *place, "--node_rank", rank, *train],
            env=clean_environment(ACCELERATE_USE_CPU="true"),
            stderr=subprocess.PIPE,
            text=True,
            cwd="/",
        )
        for rank in ("0", "1")
    ]
    told = [agent.communicate(timeout=120)[1] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], told
    first, *_ = records(there)
    assert (first["event"], first["world_size"]) == ("start", 2)
    losses = [[r["loss"] for r in records(folder) if r["event"] == "train"] for folder in (here, there)]
    assert losses[0] == losses[1] and losses[0]


def test_lockstep_train_prints_a_line_that_works_and_names_the_outcome(tmp_path: Path) -> None:
    path = written(tmp_path)
    # A user's own `accelerate config` must not change a run.
    (tmp_path / "home" / "accelerate").mkdir(parents=True)
    (tmp_path / "home" / "accelerate" / "default_config.yaml").write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: FSDP\nmixed_precision: fp16\nnum_processes: 7\n"
        "num_machines: 1\nuse_cpu: false\ndebug: false\nfsdp_config: {}\n"
    )
    line = [sys.executable, "-m", "runtime.cli", "train", str(path), "--processes", "2", "limit.steps=2"]
    done = run(line, HF_HOME=str(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    printed = done.stderr.splitlines()[0]
    assert "LOCKSTEP_WORLD_SIZE=2" in printed
    assert records(tmp_path)[0]["world_size"] == 2

    shell = subprocess.run(
        ["bash", "-c", printed.replace("limit.steps=2", "limit.steps=4")],
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
    )
    assert shell.returncode == 0, shell.stderr
    assert records(tmp_path)[-1]["outcome"] == "finished"
    assert json.loads((tmp_path / "run" / "outcome.json").read_text())["step"] == 4


def test_lockstep_train_tells_a_failure_by_its_exit_code(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "runtime.cli", "train", str(written(tmp_path, objective="tiny_losses:Infinite"))]
    done = run(line)
    assert done.returncode == 1
    assert "gradient is NaN or infinite" in done.stderr
    assert "Traceback" not in done.stderr.split("gradient is NaN")[0]


def test_cores_are_shared_out_unless_the_user_says_how_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [num_threads(n) for n in (1, 2, 3, 16)] == [8, 4, 2, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert num_threads(2) == 3


def test_nothing_is_left_to_defaults() -> None:
    job = JobSpec(script=Path("train.py"), config=Path("a b.yaml"), overrides=["limit.steps=3"], processes_per_node=2)
    line = command(job, python="python", port=1234, num_threads=4)
    assert line[-3:] == ["train.py", "a b.yaml", "limit.steps=3"]
    for flag, value in {"--num_processes": "2", "--num_machines": "1", "--num_cpu_threads_per_process": "4"}.items():
        assert line[line.index(flag) + 1] == value
    assert "--multi_gpu" in line
    assert environment(job, launch="x", num_threads=8)["ACCELERATE_USE_CPU"] == "true"
    on_gpus = JobSpec(script=Path("train.py"), config=Path("c.yaml"), processes_per_node=2, use_gpus=True)
    assert "ACCELERATE_USE_CPU" not in environment(on_gpus, launch="x", num_threads=8)


def test_the_world_size_asked_for_is_the_launchers_then_the_configurations(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCKSTEP_WORLD_SIZE", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    assert requested_world_size(None) == 1
    assert requested_world_size(3) == 3
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert requested_world_size(None) == 2
    assert requested_world_size(4) == 4
    monkeypatch.setenv("LOCKSTEP_WORLD_SIZE", "8")
    assert requested_world_size(4) == 8
    monkeypatch.setenv("LOCKSTEP_WORLD_SIZE", "two")
    with pytest.raises(WorldSizeError, match="not a number"):
        requested_world_size(None)


def test_a_process_group_of_another_size_is_refused() -> None:
    check_world_size(2, 2)
    with pytest.raises(WorldSizeError, match=r"2 processes were asked for, but the process group has 1"):
        check_world_size(2, 1)
    with pytest.raises(WorldSizeError, match=r"1 process was asked for, but the process group has 4"):
        check_world_size(1, 4)


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_processes_that_would_train_alone_are_refused_before_torch_is_imported(command: str) -> None:
    code = f"import sys; from runtime.launched import run; assert run('{command}', ['run.yaml']) == 2"
    code += "; assert 'torch' not in sys.modules"
    done = run([sys.executable, "-c", code], LOCKSTEP_WORLD_SIZE="2")
    assert done.returncode == 0, done.stderr
    assert "2 processes were asked for" in done.stderr
