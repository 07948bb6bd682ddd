"""``lockstep stop`` for a run on this machine, where a Slurm client is installed and no controller answers."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from launch import schedulers
from launch.cluster_scheduler import QueuedJob
from launch.slurm import queue
from launch.slurm.scheduler import Slurm
from runtime.cli import main
from runtime.commands import jobs
from runtime.errors import SchedulerError

AWAY = "#!/bin/sh\necho 'slurm_load_jobs error: Unable to contact slurm controller (connect failure)' >&2\nexit 1\n"
SILENT = "#!/bin/sh\nexec sleep 60\n"


@pytest.fixture(params=[AWAY, SILENT], ids=["away", "silent"])
def _no_controller(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "squeue").write_text(request.param)
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(queue, "_TIMEOUT_SECONDS", 0.3)
    monkeypatch.setattr(jobs, "_POLL_SECONDS", 0.05)


def written_to(run: Path) -> Path:
    run.mkdir()
    lock = run / "fence-00000001.json"
    lock.write_text(json.dumps({"released": False}))
    return lock


@pytest.mark.usefixtures("_no_controller")
def test_a_run_here_is_stopped_by_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lock = written_to(tmp_path / "run")

    def leave_when_asked() -> None:
        while not (tmp_path / "run" / "STOP").exists():
            time.sleep(0.01)
        (tmp_path / "run" / "outcome.json").write_text(json.dumps({"outcome": "stopped", "step": 7}))
        lock.write_text(json.dumps({"released": True}))

    running = threading.Thread(target=leave_when_asked, daemon=True)
    running.start()
    assert main(["stop", str(tmp_path / "run"), "--timeout", "60"]) == 0
    running.join()
    told = capsys.readouterr()
    assert "stopped at step 7" in told.out
    assert "squeue does not answer" in told.err
    assert told.err.count("\n") == 1


@pytest.mark.usefixtures("_no_controller")
def test_where_nobody_writes_it_says_that_the_queue_cannot_be_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written_to(tmp_path / "run").write_text(json.dumps({"released": True}))
    assert main(["stop", str(tmp_path / "run")]) == 1
    assert "no process writes to" in (said := capsys.readouterr().err)
    assert "squeue" in said
    assert not (tmp_path / "run" / "STOP").exists()


def test_a_queue_that_falls_silent_while_a_job_stops_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = written_to(tmp_path / "run")
    monkeypatch.setattr(jobs, "_POLL_SECONDS", 0.01)
    running = QueuedJob("1", "RUNNING", "0:01", "1:00", "1", "None", tmp_path / "run", waiting=False, active=True)
    answers: list[list[QueuedJob] | None] = [[running], [running], None, [running], []]

    class Answering(Slurm):
        has_queue = True

        def queued(self) -> list[QueuedJob]:
            answer = answers.pop(0)
            if answer is None:
                raise SchedulerError("squeue does not answer")
            return answer

    monkeypatch.setattr(schedulers, "SCHEDULERS", (Answering(),))
    (tmp_path / "run" / "outcome.json").write_text(json.dumps({"outcome": "stopped", "step": 7}))
    assert main(["stop", str(tmp_path / "run"), "--timeout", "60"]) == 0
    assert not answers
    assert lock.exists()
