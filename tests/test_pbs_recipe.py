"""The recipe for a scheduler, followed for PBS: a folder (``tests/recipes/pbs``) and a row in the table, nothing else."""

from __future__ import annotations

import json
import os
import shlex
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch import schedulers
from launch.cluster_scheduler import JobIdentity
from launch.schedulers import own_job
from runtime.cli import main
from runtime.errors import SchedulerError
from tests.observed import configuration
from tests.recipes.pbs.queue import parsed
from tests.recipes.pbs.scheduler import Pbs

# As OpenPBS 23 answers `qstat -x -f -F json`.
QSTAT: dict[str, Any] = {
    "pbs_version": "23.06.06",
    "Jobs": {
        "71.head": {
            "Job_Name": "digits",
            "job_state": "R",
            "comment": "Job run at Thu Nov 26 at 10:00",
            "Resource_List": {"nodect": 2, "walltime": "04:00:00"},
            "resources_used": {"walltime": "00:10:02"},
            "Variable_List": {"PBS_O_HOME": "/home/me", "LOCKSTEP_RUN": "RUN"},
        },
        "72.head": {"Job_Name": "STDIN", "job_state": "R", "Variable_List": {"PBS_O_HOME": "/home/me"}},
        "73.head": {
            "job_state": "Q",
            "comment": "Not Running: Insufficient amount of resource: ncpus",
            "Resource_List": {"nodect": 1},
            "Variable_List": {"LOCKSTEP_RUN": "/runs/other"},
        },
        "70.head": {"job_state": "F", "Resource_List": {"nodect": 1}, "Variable_List": {"LOCKSTEP_RUN": "/runs/old"}},
    },
}


@pytest.fixture(autouse=True)
def _row(monkeypatch: pytest.MonkeyPatch) -> None:
    """The row in ``launch/schedulers.py``."""
    monkeypatch.setattr(schedulers, "SCHEDULERS", (*schedulers.SCHEDULERS, Pbs()))


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of PBS's programs, each of which notes how it was called."""
    folder = tmp_path / "bin"
    folder.mkdir()
    answers = {
        "qstat": f'if [ "$1" = -x ]; then cat {shlex.quote(str(tmp_path / "qstat.json"))}; else echo "    run_count = 3"; fi',
        "squeue": "true",  # of a cluster that has both
        "qsub": "echo 74.head",
        "qdel": "true",
        "qrerun": "true",
        "pbs_tmrsh": 'shift; exec "$@"',
    }
    for name, answer in answers.items():
        path = folder / name
        note = f'echo "{name} $*" >> {shlex.quote(str(tmp_path / "asked"))}'
        path.write_text(f"#!/bin/bash\n{note}\n{answer}\n")
        path.chmod(path.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def asked(folder: Path, program: str) -> list[str]:
    path = folder / "asked"
    lines = path.read_text().splitlines() if path.exists() else []
    return [line for line in lines if line.startswith(f"{program} ")]


def with_queue(folder: Path, run: Path, *, state: str = "R") -> None:
    queue = json.loads(json.dumps(QSTAT).replace('"RUN"', json.dumps(str(run))))
    queue["Jobs"]["71.head"]["job_state"] = state
    (folder / "qstat.json").write_text(json.dumps(queue))


def written(folder: Path, **changes: Any) -> Path:
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(configuration(folder / "run", name="two words", **changes)))
    return path


def test_the_queue_lists_the_jobs_that_are_ours(cluster: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with_queue(cluster, cluster / "run")
    assert [(job.number, job.waiting, job.active) for job in parsed((cluster / "qstat.json").read_text())] == [
        ("71.head", False, True), ("73.head", True, True), ("70.head", False, False),
    ]  # fmt: skip
    assert main(["jobs", "--json"]) == 0
    first = json.loads(capsys.readouterr().out)[0]
    assert first == {
        "number": "71.head", "state": "R", "elapsed": "00:10:02", "limit": "04:00:00", "nodes": "2",
        "reason": "Job run at Thu Nov 26 at 10:00", "run": str(cluster / "run"), "step": None,
    }  # fmt: skip
    assert main(["jobs"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[2].split()[:2] == ["73.head", "Q"]
    assert "(Not Running: Insufficient amount of resource: ncpus)" in table[2]


def test_where_no_scheduler_is_the_programs_of_all_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["jobs"]) == 1
    assert "squeue or qstat is not installed here" in capsys.readouterr().err


def test_a_job_that_waits_is_cancelled_by_lockstep_stop(cluster: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (cluster / "run").mkdir()
    with_queue(cluster, cluster / "run", state="Q")
    assert main(["stop", str(cluster / "run")]) == 0
    assert asked(cluster, "qdel") == ["qdel 71.head"]
    assert "cancelled while waiting in the queue: job 71.head" in capsys.readouterr().out


def test_a_submission_leaves_its_folder_and_is_handed_to_qsub(
    cluster: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "s3cret")
    options = [
        "--nodes",
        "2",
        "--processes-per-node",
        "2",
        "--time",
        "1-02:00:05",
        "--queue",
        "gpu",
        "--env",
        "GREETING=a b",
    ]
    assert main(["submit", "pbs", str(written(cluster)), *options]) == 0
    assert capsys.readouterr().out == "submitted job 74.head: two words\n"
    (folder,) = (cluster / "run" / "jobs").iterdir()
    assert {path.name for path in folder.iterdir()} >= {"job.sh", "job.yaml", "code", "submission.json", "secrets"}
    assert asked(cluster, "qsub") == [f"qsub {folder}/job.sh"]
    text = (folder / "job.sh").read_text()
    head = [line.removeprefix("#PBS ") for line in text.splitlines() if line.startswith("#PBS")]
    assert head == [
        "-N two-words", "-l select=2:ncpus=2", "-l place=scatter", "-l walltime=26:00:05", "-q gpu",
        f"-o {cluster}/run/logs/", "-j oe", "-r y", f"-v LOCKSTEP_RUN={cluster}/run",
    ]  # fmt: skip
    assert "s3cret" not in text
    assert subprocess.run(["bash", "-n", str(folder / "job.sh")], check=False).returncode == 0


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (75, True), (2, False), (1, True)])
def test_the_script_starts_each_machine_and_requeues_what_is_to_go_on(
    cluster: Path, monkeypatch: pytest.MonkeyPatch, code: int, requeued: bool
) -> None:
    """The script runs in bash, with a python that notes its arguments and variables and ends with a code."""
    python = cluster / "bin" / "python"
    seen = '"$GREETING" "$WANDB_API_KEY" "$PBS_JOBID" "$LOCKSTEP_RESTART"'
    note = f'printf "%s|" {seen} "${{@: -4}}" > {cluster}/started-"${{@: -3:1}}"'
    python.write_text(f"#!/bin/bash\n{note}\nexit {code}\n")
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))
    monkeypatch.setenv("WANDB_API_KEY", "s3cret")
    line = ["--nodes", "2", "--processes-per-node", "2", "--env", "GREETING=a 'b' $c"]
    assert main(["submit", "pbs", str(written(cluster)), *line]) == 0
    (folder,) = (cluster / "run" / "jobs").iterdir()
    (cluster / "nodes").write_text("n1\nn1\nn2\nn2\n")
    given = {**os.environ, "PBS_JOBID": "74.head", "PBS_NODEFILE": str(cluster / "nodes")}
    given.pop("WANDB_API_KEY")
    done = subprocess.run(["bash", str(folder / "job.sh")], env=given, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    for rank in (0, 1):
        told = (cluster / f"started-{rank}").read_text()
        assert told == f"a 'b' $c|s3cret|74.head|2|--node-rank|{rank}|--main-address|n1|"
    assert sorted(line.split()[1] for line in asked(cluster, "pbs_tmrsh")) == ["n1", "n2"]
    assert asked(cluster, "qrerun") == ["qrerun 74.head"] * requeued


def test_a_rank_knows_its_job_by_the_variables_of_pbs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    assert own_job() is None
    monkeypatch.setenv("PBS_JOBID", "71.head")
    monkeypatch.setenv("LOCKSTEP_RESTART", "2")
    assert own_job() == JobIdentity("71.head", 2)


def test_what_does_not_apply_to_a_scheduler_is_left_out() -> None:
    kubernetes = schedulers.SCHEDULERS[1]
    assert kubernetes.title == "Kubernetes"
    assert (kubernetes.queued(), kubernetes.own_job(), kubernetes.own_step(), kubernetes.has_queue) == (
        [],
        None,
        None,
        False,
    )
    with pytest.raises(SchedulerError, match="restarts jobs automatically"):
        kubernetes.requeue("1")
