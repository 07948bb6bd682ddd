"""Real launches of two ranks: one fails, is stopped or is killed, or all are asked to leave; nothing hangs, all is named."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from tests.chaos.nursery import Nursery
from tests.forked import Forked
from tests.observed import configuration, observe
from tests.process_pool import ProcessPool
from tests.test_launch import clean_environment

_ENDED_WITHIN_SECONDS = 120


def endless(folder: Path, **changes: Any) -> dict[str, Any]:
    """A run that trains until it is asked to stop."""
    rows = {"target": "tiny_failing:Rows", "args": {"size": 6400}}
    return configuration(
        folder / "run",
        **{
            "data": {"train": rows},
            "limit": {"steps": 1_000_000, "silence_seconds": 3},
            "reporting": {"every": "20 steps", "progress": False},
            **changes,
        },
    )


@contextmanager
def launched(folder: Path, config: dict[str, Any]) -> Iterator[subprocess.Popen[str]]:
    """Start ``lockstep train`` with two processes; whatever is left of it is ended."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    line = [sys.executable, "-m", "runtime.cli", "train", str(path), "--processes", "2"]
    process = subprocess.Popen(
        line, env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        yield process
    finally:
        for pid in [*ranks(folder).values(), process.pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate(timeout=_ENDED_WITHIN_SECONDS)


def wait_for_step(folder: Path, process: subprocess.Popen[str], step: int = 20) -> None:
    """Wait until a run has reported a step."""
    records = folder / "run" / "metrics.jsonl"
    until = time.monotonic() + _ENDED_WITHIN_SECONDS
    while time.monotonic() < until and process.poll() is None:
        if records.exists() and f'"step": {step},' in records.read_text():
            return
        time.sleep(0.05)
    raise AssertionError(process.communicate())


def ranks(folder: Path) -> dict[int, int]:
    """Return rank to process id, as the system tells it."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and str(folder / "config.yaml") in (entry / "cmdline").read_text():
                variables = (entry / "environ").read_text().split("\0")
                rank = next((v[5:] for v in variables if v.startswith("RANK=")), None)
                main = "train.py" in (entry / "cmdline").read_text() and "launch" not in (entry / "cmdline").read_text()
                if rank is not None and main:
                    found[int(rank)] = int(entry.name)
        except OSError:
            continue
    return found


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    out, err = process.communicate(timeout=_ENDED_WITHIN_SECONDS)
    return process.returncode, out + err


def test_a_sample_that_one_rank_cannot_read_is_named_with_its_rank_at_once(nursery: Nursery, tmp_path: Path) -> None:
    rows = {"target": "tiny_failing:Rows", "args": {"fails_on": 1, "size": 6400}}
    config = endless(tmp_path, data={"train": rows}, limit={"steps": 1_000_000, "silence_seconds": 300})
    with Forked(nursery, tmp_path, config, 2) as run:
        run.wait_for_end()  # in less than a minute, so no silence was waited for
        assert "lockstep: rank 1: reading sample" in run.told()
        assert "IndexError: row 7 is short" in run.told()
        assert "rank 1 (host " in run.told()  # as rank 0 tells it
        assert "this is rank 0" in run.told()
        outcome = run.outcome()
    assert (outcome["outcome"], outcome["exit_code"]) == ("failed", 1)
    told = r"rank 1 \(host .*\), in data at step 1, failed: .*IndexError: row 7 is short"
    assert re.match(told, outcome["message"], re.DOTALL)


def test_a_rank_that_is_stopped_is_named_by_the_other_and_in_the_outcome(nursery: Nursery, tmp_path: Path) -> None:
    with Forked(nursery, tmp_path, endless(tmp_path, limit={"steps": 1_000_000, "silence_seconds": 2}), 2) as run:
        run.wait_for_step(20)
        pids = run.ranks()
        os.kill(pids[1], signal.SIGSTOP)
        run.wait_for_end(pids[0])
        os.kill(pids[1], signal.SIGKILL)  # the launch agent would wait 30 s for it
        run.wait_for_end()
        assert "lockstep: rank 1 (host " in run.told()
        assert "silent for" in run.told()
        assert re.search(r'run/trainer\.py", line \d+, in train\b', run.told())  # the stack of the rank that answers
        assert (run.outcome()["outcome"], run.outcome()["exit_code"]) == ("failed", 1)
        assert re.match(r"rank 1 \(host .*\), in .* at step \d+, silent for", run.outcome()["message"])


def test_a_rank_0_that_wakes_up_after_another_job_took_over_leaves_no_word(nursery: Nursery, tmp_path: Path) -> None:
    with Forked(nursery, tmp_path, endless(tmp_path, limit={"steps": 1_000_000, "silence_seconds": 2}), 2) as run:
        run.wait_for_step(20)
        pids = run.ranks()
        os.kill(pids[0], signal.SIGSTOP)
        run.wait_for_end(pids[1])
        folder = tmp_path / "run"
        (newest,) = folder.glob("fence-*.json")
        lock = newest.read_text().replace('"token": "', '"token": "another')
        newest.with_name("fence-000099.json").write_text(lock)
        (folder / "outcome.json").write_text("another job's")
        os.kill(pids[0], signal.SIGCONT)
        run.wait_for_end()
        assert "which rank 0 or its launch agent hosts, is silent for" in run.told()
        assert (folder / "outcome.json").read_text() == "another job's"


def test_a_signal_to_every_process_still_saves_and_the_run_goes_on(tmp_path: Path) -> None:
    config = endless(tmp_path)
    config["data"] |= {"loader": {"num_workers": 2}}
    with launched(tmp_path, config) as process:
        wait_for_step(tmp_path, process)
        launcher = Path(f"/proc/{ranks(tmp_path)[0]}/stat").read_text().rsplit(")", 1)[1].split()
        os.killpg(int(launcher[2]), signal.SIGTERM)  # launcher, ranks and their workers
        code, told = end(process)
    assert code == 75, told
    assert "Stopped by" in told
    outcome = json.loads((tmp_path / "run" / "outcome.json").read_text())
    assert outcome["outcome"] == "stopped"
    names = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert names == [f"step-{outcome['step']:08d}"]


def test_a_stop_file_stops_and_the_next_start_does_not_mind_it(nursery: Nursery, tmp_path: Path) -> None:
    with Forked(nursery, tmp_path, endless(tmp_path), 2) as run:
        run.wait_for_step(20)
        (tmp_path / "run" / "STOP").touch()
        run.wait_for_end()
        assert "Stopped by the file STOP" in run.told()
        assert run.outcome()["exit_code"] == 75
        step = run.outcome()["step"]
    with Forked(nursery, tmp_path, endless(tmp_path, limit={"steps": step + 2}), 2) as run:
        run.wait_for_end()
        assert run.outcome() == {"outcome": "finished", "exit_code": 0, "step": step + 2, "launch": None}


def test_a_second_interrupt_ends_a_run_whose_other_rank_is_stopped(nursery: Nursery, tmp_path: Path) -> None:
    with Forked(nursery, tmp_path, endless(tmp_path, limit={"steps": 1_000_000, "silence_seconds": 300}), 2) as run:
        run.wait_for_step(20)
        pids = run.ranks()
        os.kill(pids[1], signal.SIGSTOP)
        os.kill(pids[0], signal.SIGINT)
        time.sleep(2.2)  # within two seconds it is taken for the same Ctrl-C
        assert pids[0] in run.ranks().values()
        os.kill(pids[0], signal.SIGINT)
        run.wait_for_end(pids[0])  # who waits for the other rank would wait for 300 s
        os.kill(pids[1], signal.SIGKILL)
        run.wait_for_end()
        assert "interrupted again; exiting without a save" in run.told()


def test_a_rank_whose_peers_never_come_says_so_and_leaves(nursery: Nursery, tmp_path: Path) -> None:
    config = endless(tmp_path, limit={"steps": 1, "stall_seconds": 2})
    with Forked(nursery, tmp_path, config, 2, own=[1], port=1) as run:
        run.wait_for_end()
        assert "rank 1: not all ranks connected to 127.0.0.1:1 within 2 s" in run.told()
        assert "Traceback" not in run.told()


def test_the_rank_that_holds_the_others_up_is_named(pool: ProcessPool, tmp_path: Path) -> None:
    rows = {"target": "tiny_failing:Rows", "args": {"slow_on": 1}}
    # Weights are summed for eight steps at once, so their data is read at once, four steps ahead: none in the last eight.
    config = configuration(tmp_path, data={"train": rows}, limit={"steps": 24}, reporting={"every": "8 steps"})
    pool.run(observe, 3, config)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    reports = [record for record in records if record["event"] == "train"][:2]
    assert [report["slowest_rank"] for report in reports] == [1, 1]
    assert all(report["slowest_rank_excess"] > 0.2 for report in reports)
    assert all(0.2 < report["data_share"] <= 1 for report in reports)
    assert sum("rank 1 is the slowest" in record.get("text", "") for record in records) == 1
