"""What is decided about a job: whether it goes on, which code it runs, what must not be submitted."""

from __future__ import annotations

import argparse
import json
import os
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.code_copy import code_files, revision, snapshot
from launch.ended_job import JobEnd, decide
from launch.options import seconds, variables
from launch.slurm.requeue import first_failed
from launch.slurm.requeue import main as judge_job
from runtime.cli import main
from runtime.config.file import load
from runtime.distributed.watchdog import is_rank_error
from runtime.errors import ConfigurationError
from tests.observed import configuration

FINISHED = {"outcome": "finished", "exit_code": 0}
SAVED = {"outcome": "stopped", "exit_code": 75, "reason": "SIGTERM"}
BY_FILE = {"outcome": "stopped", "exit_code": 75, "reason": "the file STOP"}
LOST = {"outcome": "failed", "exit_code": 1, "message": "rank 1, silent for 60 s", "repeats": False}
NAN = {"outcome": "failed", "exit_code": 1, "message": "the gradient is NaN", "repeats": True}
MISTAKE = {"outcome": "failed", "exit_code": 2, "message": "no such key", "repeats": True}


@pytest.mark.parametrize(
    ("ended", "requeue", "exit_code"),
    [
        (JobEnd(FINISHED, 0), False, 0),
        (JobEnd(FINISHED, 0, warned="the time limit is near"), False, 0),
        (JobEnd(BY_FILE, 0, warned="the time limit is near", stop_file=True), True, 75),
        (JobEnd(BY_FILE, 0, stop_file=True), False, 75),
        (JobEnd({**BY_FILE, "reason": None}, 0, stop_file=True), False, 75),  # another rank saw the file first
        (JobEnd({**SAVED, "reason": "SIGINT"}, 0), False, 75),
        (JobEnd({**SAVED, "reason": "the time limit"}, 0), True, 75),
        (JobEnd(SAVED, 0), True, 75),  # preempted: saves, leaves with 0, and must not be taken for finished
        (JobEnd(SAVED, 0, cancelled=True), False, 75),
        (JobEnd(None, 143, cancelled=True), False, 1),
        (JobEnd(LOST, 1), True, 75),
        (JobEnd(LOST, 1, progressed=False), False, 1),
        (JobEnd(None, 137), True, 75),  # rank 0 itself was killed
        (JobEnd(None, 137, progressed=False), False, 1),
        (JobEnd(NAN, 1), False, 1),
        (JobEnd(MISTAKE, 2), False, 2),
        (JobEnd({"outcome": "failed", "exit_code": 1}, 1), False, 1),  # of a version that did not say
        (JobEnd(None, 2), False, 2),  # before there could be an outcome
        (JobEnd(None, 127), False, 2),  # there is no such Python on the nodes
        (JobEnd(SAVED, 0, restarts=3, max_requeues=3), False, 75),
        (JobEnd(SAVED, 0, restarts=2, max_requeues=3), True, 75),
        (JobEnd(LOST, 1, restarts=3, max_requeues=3), False, 1),
    ],
)
def test_a_job_goes_on_if_that_can_help_and_nobody_stopped_it(ended: JobEnd, requeue: bool, exit_code: int) -> None:
    verdict = decide(ended)
    assert verdict.requeue == requeue
    assert verdict.why
    if not requeue:
        assert verdict.exit_code == exit_code


def test_the_loss_of_a_rank_is_told_from_an_error_that_a_rank_raised() -> None:
    assert is_rank_error("rank 1 (host b), in data at step 3, failed: ValueError: x; this is rank 0")
    assert not is_rank_error("rank 1 (host b), in backward at step 3, silent for 60 s: its process died")


def judged(folder: Path, restart: int, *, outcome: dict[str, Any] | None, code: int = 0, **fakes: str) -> int:
    """Let the judge look at a run folder, with a scontrol that notes what it is asked."""
    state = fakes.get("state", "RUNNING RunTime=00:05:00 TimeLimit=1-00:00:00")
    fake = f'#!/bin/bash\necho "$@" >> {folder}/asked\n[ "$1" = requeue ] && exit {fakes.get("refuses", 0)}\n'
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin" / "scontrol").write_text(f"{fake}echo JobId=7 JobState={state} Reason=None\n")
    (folder / "bin" / "scontrol").chmod(0o755)
    logs = folder / "logs" / "slurm-7"
    (logs / f"restart-{restart}").mkdir(parents=True)
    if outcome is not None:
        (folder / "outcome.json").write_text(json.dumps({**outcome, "launch": f"7-{restart}"}))
    (logs / f"restart-{restart}" / "srun.log").write_text("srun: error: n2: task 1: Killed\n")
    (logs / f"restart-{restart}" / "rank-1.log").write_text("a line\nthe last line\n")
    words = ["--logs", str(logs), "--launch", f"7-{restart}", "--job", "7", "--code", str(code), "--max-requeues", "9"]
    return judge_job([str(folder), *words])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def asked(folder: Path) -> list[str]:
    """Return what Slurm was asked to do."""
    return [line for line in (folder / "asked").read_text().splitlines() if line.startswith("requeue")]


def test_a_run_that_keeps_losing_ranks_goes_on_only_as_long_as_it_gets_further(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert judged(folder, 0, outcome=LOST, code=1) == 75
    (folder / "checkpoints" / "step-00000010-loss-0.5").mkdir(parents=True)
    assert judged(folder, 1, outcome=LOST, code=1) == 75
    (folder / "checkpoints" / "step-00000020.partial-0af3").mkdir()  # is none
    capsys.readouterr()
    assert judged(folder, 2, outcome=LOST, code=1) == 1
    assert asked(folder) == ["requeue 7", "requeue 7"]
    said = capsys.readouterr().err
    assert "rank 1 failed first; its last lines" in said
    assert said.index("the last line") < said.index("not requeued")
    assert "no new checkpoint since" in said


@pytest.mark.parametrize(
    ("state", "requeued"),
    [
        ("RUNNING RunTime=00:05:00 TimeLimit=1-00:00:00", True),  # preempted, within its grace time
        ("CANCELLED RunTime=00:05:00 TimeLimit=1-00:00:00", False),
        ("COMPLETING RunTime=00:05:00 TimeLimit=1-00:00:00", False),  # cancelled, and its last process is this one
        ("COMPLETING RunTime=00:05:00 TimeLimit=UNLIMITED", False),
        ("COMPLETING RunTime=1-00:00:05 TimeLimit=1-00:00:00", True),  # ended by its time limit
    ],
)
def test_a_cancelled_job_stays_cancelled(folder: Path, state: str, requeued: bool) -> None:
    assert judged(folder, 0, outcome=SAVED, state=state) == 75
    assert asked(folder) == ["requeue 7"] * requeued


def test_an_outcome_of_an_earlier_start_is_not_taken_for_this_ones(folder: Path) -> None:
    (folder / "outcome.json").write_text(json.dumps({**FINISHED, "launch": "7-0"}))
    assert judged(folder, 1, outcome=None, code=137) == 75
    assert asked(folder) == ["requeue 7"]


def test_a_requeue_that_slurm_refuses_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert judged(folder, 0, outcome=SAVED, refuses="1") == 75
    assert "cannot be requeued" in capsys.readouterr().err


def test_a_job_that_slurm_has_put_back_itself_is_not_requeued_twice(folder: Path) -> None:
    """A node was lost: the job is COMPLETING as a cancelled one is; ended for good, it would lose its secrets."""
    state = "COMPLETING RunTime=00:05:00 TimeLimit=1-00:00:00 Restarts=1"
    assert judged(folder, 0, outcome=LOST, code=1, state=state) == 75
    assert asked(folder) == []
    assert judged(folder, 1, outcome=SAVED, state=state) == 75
    assert asked(folder) == []  # now cancelled


def test_the_rank_that_the_run_itself_names_ended_first_whatever_srun_says(tmp_path: Path) -> None:
    (tmp_path / "srun.log").write_text("srun: error: n1: task 0: Exited with exit code 1\n")
    assert first_failed(tmp_path / "srun.log", "rank 3 (host n4), in data at step 9, silent for 60 s") == 3
    assert first_failed(tmp_path / "srun.log", "no such key") == 0


@pytest.mark.parametrize(
    ("text", "rank"),
    [
        ("srun: error: n2: task 5: Killed\nsrun: error: n1: tasks 0-4: Exited with exit code 1\n", 5),
        ("srun: error: n1: tasks 2-3: Exited with exit code 1\n", 2),
        ("srun: First task exited 5s ago\n", None),
    ],
)
def test_the_rank_that_ended_first_is_the_one_that_srun_tells_first(
    tmp_path: Path, text: str, rank: int | None
) -> None:
    (tmp_path / "srun.log").write_text(text)
    assert first_failed(tmp_path / "srun.log") == rank


OF_THE_SHELF: dict[str, Any] = {
    "code": ".",
    "model": {"target": "MLP", "args": {"in_features": 64, "hidden": [8], "out_features": 10}},
    "data": {"train": {"target": "digits", "args": {"split": "train"}}},
}


def git(folder: Path, *words: str) -> None:
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "-C", str(folder), *who, *words], check=True, capture_output=True)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A repository with a subfolder, an ignored file, a change, a deletion and a file that is not added yet."""
    project = tmp_path / "a project"
    (project / "sub").mkdir(parents=True)
    for name in ("kept.py", "changed.py", "deleted.py", "sub/inner.py", "sub/notes.md", "data.bin"):
        (project / name).write_text(f"# {name}\n")
    (project / ".gitignore").write_text("*.bin\n")
    (project / "run.yaml").write_text(yaml.safe_dump(configuration("runs/x", **OF_THE_SHELF)))
    git(project, "init", "-q")
    git(project, "add", "-A")
    git(project, "commit", "-qm", "first")
    (project / "changed.py").write_text("# another\n")
    (project / "deleted.py").unlink()
    (project / "new ü.py").write_text("# new\n")
    return project


def test_the_copy_of_the_code_is_what_git_calls_code_as_it_is_now(project: Path, tmp_path: Path) -> None:
    loaded = load(project / "run.yaml")
    snapshot(loaded.code, tmp_path / "copy", loaded.where)
    copied = {str(path.relative_to(tmp_path / "copy")) for path in (tmp_path / "copy").rglob("*") if path.is_file()}
    assert copied == {
        ".gitignore",
        "run.yaml",
        "kept.py",
        "changed.py",
        "sub/inner.py",
        "sub/notes.md",
        "new ü.py",
    }
    assert (tmp_path / "copy" / "changed.py").read_text() == "# another\n"


def test_without_git_the_code_is_the_python_files(project: Path, tmp_path: Path) -> None:
    (project / ".git").rename(tmp_path / "gone")
    (project / "runs" / "x").mkdir(parents=True)
    (project / "runs" / "x" / "old.py").write_text("")
    assert {str(path) for path in code_files(project)} == {
        "kept.py",
        "changed.py",
        "sub/inner.py",
        "new ü.py",
    }


def test_the_commit_and_what_is_not_committed_are_recorded(project: Path) -> None:
    found = revision(project)
    told = subprocess.run(["git", "-C", str(project), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert found.commit == told.stdout.strip()
    assert b"+# another" in found.changes
    assert not found.cut
    (project / "changed.py").write_text("x = 1\n" * 400_000)
    found = revision(project)
    assert (len(found.changes), found.cut) == (1 << 20, True)


def test_a_code_folder_full_of_data_is_refused(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.code_copy._MAX_BYTES", 100)
    (project / "big.npy").write_bytes(b"\0" * 5000)
    loaded = load(project / "run.yaml")
    with pytest.raises(ConfigurationError, match=r"run.yaml:\d+ code: .* largest file is big.npy"):
        snapshot(loaded.code, tmp_path / "copy", loaded.where)
    assert not (tmp_path / "copy").exists()


FAKE_SBATCH = """#!/bin/bash
env > "$TOLD.env"
cp "$2" "$TOLD.sh"
if [ -n "$REFUSES" ]; then echo no such partition >&2; exit 1; fi
echo "71;c"
"""


@pytest.fixture
def told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An sbatch that keeps what it was given, in ``told.sh`` and ``told.env``."""
    (folder / "bin").mkdir()
    (folder / "bin" / "sbatch").write_text(FAKE_SBATCH)
    (folder / "bin" / "sbatch").chmod(0o755)
    monkeypatch.setenv("TOLD", str(folder / "told"))
    for name, value in {"SLURM_JOB_ID": "5", "LOCKSTEP_LAUNCH": "5-0", "HF_TOKEN": "hush1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MY_KEY", "hush2'; touch pwned")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    return folder / "told"


def test_what_is_submitted_lies_beside_the_run_and_holds_no_secret(
    project: Path, told: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(project)
    words = ["--env", "MY_KEY", "--env", "OTHER_PASSWORD=hush3", "--env", "PLAIN=a,b", "seed=3"]
    assert main(["submit", "slurm", "run.yaml", "--nodes", "2", *words]) == 0
    said = capsys.readouterr().out
    assert "submitted job 71: run, 2 node(s), 2 process(es)" in said
    run = project / "runs" / "x"
    assert f"{run}/logs/slurm-71.log" in said
    (job,) = (run / "jobs").iterdir()
    assert {path.name for path in job.iterdir()} == {
        "job.sh", "run.yaml", "code", "submission.json", "changes.diff", "secrets"
    }  # fmt: skip
    assert (job / "job.sh").read_text() == told.with_suffix(".sh").read_text()
    assert stat.S_IMODE((job / "secrets").stat().st_mode) == 0o600
    shell = f". {str(job / 'secrets')!r}; echo $HF_TOKEN; echo $MY_KEY; echo $OTHER_PASSWORD"
    sourced = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True, env={})
    assert sourced.stdout.splitlines() == ["hush1", "hush2'; touch pwned", "hush3"]
    for path in job.rglob("*"):
        assert path.name == "secrets" or not path.is_file() or b"hush" not in path.read_bytes()
    assert "hush" not in said
    given = told.with_suffix(".env").read_text()
    assert "hush" not in given  # sbatch would keep them in the cluster's state
    assert "SLURM_JOB_ID" not in given
    assert "LOCKSTEP_LAUNCH" not in given
    record = json.loads((job / "submission.json").read_text())
    assert (record["nodes"], record["changes"]) == (2, "whole")
    assert f'code="{job}/code"' in record["overrides"]
    assert "export PLAIN=a,b" in told.with_suffix(".sh").read_text()


def test_a_dry_run_prints_the_script_and_writes_nothing(
    project: Path, told: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(project)
    assert main(["submit", "slurm", "run.yaml", "--dry-run", "--time", "1-02:03:04"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("#!/bin/bash\n")
    assert "#SBATCH --time=1-02:03:04\n" in said
    assert "hush" not in said
    assert not (project / "runs").exists()
    assert not told.with_suffix(".sh").exists()


def test_a_job_that_slurm_refuses_leaves_no_secret_behind(
    project: Path, told: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(project)
    monkeypatch.setenv("REFUSES", "1")
    assert main(["submit", "slurm", "run.yaml"]) == 1
    assert "no such partition" in capsys.readouterr().err
    assert not list(project.rglob("secrets"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["optimizer.args.lrr=3"], "SGD has no argument 'lrr'"),
        (
            ["strategy.world_size=3", "--nodes", "2"],
            "strategy.world_size: is 3, but 2 nodes with 1 processes each make 2",
        ),
        (["--env", "NOT_SET_ANYWHERE"], "--env NOT_SET_ANYWHERE: is not set here"),
        (["--sbatch=--signal=9"], "--signal is set by Lockstep"),
        (["prediction.columns.api_key=hush9"], "prediction.columns.api_key: is a secret"),
        (["name=a\tb"], "control character"),
        (["limit.steps=many"], "limit.steps: "),
        (["limit.stepss=3"], "did you mean 'steps'"),
    ],
)
def test_mistakes_are_told_before_anything_is_submitted(
    project: Path,
    told: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(project)
    assert main(["submit", "slurm", "run.yaml", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "hush" not in error
    assert not (project / "runs").exists()
    assert not told.with_suffix(".sh").exists()


def test_where_there_is_no_slurm_one_message_says_so(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(project)
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["submit", "slurm", "run.yaml"]) == 1
    assert "sbatch is not installed here" in capsys.readouterr().err
    assert not (project / "runs").exists()


@pytest.mark.parametrize(
    ("text", "expected"), [("4:00:00", 14400), ("0:01:00", 60), ("2-00:00:01", 172801), ("100:00:00", 360000)]
)
def test_times_are_read_as_slurm_writes_them(text: str, expected: int) -> None:
    assert seconds(text) == expected


@pytest.mark.parametrize("text", ["", "4", "4h", "0:00:59", "1:2:3:4", "1:60:00", "-1:00:00", "٤:00:00"])
def test_other_times_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"H:MM:SS|less than a minute"):
        seconds(text)


def test_a_secret_is_known_by_how_its_name_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    found = variables(["A_KEY=1", "b_secret=2", "KEYBOARD=3", "EMPTY="])
    assert found.secret == {"A_KEY": "1", "b_secret": "2"}
    assert found.plain == {"KEYBOARD": "3", "EMPTY": ""}
