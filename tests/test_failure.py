"""Real launches of two ranks: one fails, is stopped or is killed, or all are asked to leave; nothing hangs, all is named."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from tests.observed import configuration, observe
from tests.process_pool import ProcessPool
from tests.test_launch import ROOT, clean_environment

_ENDED_WITHIN_SECONDS = 60


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


def test_a_sample_that_one_rank_cannot_read_is_named_with_its_rank_at_once(tmp_path: Path) -> None:
    rows = {"target": "tiny_failing:Rows", "args": {"fails_on": 1, "size": 6400}}
    with launched(tmp_path, endless(tmp_path, data={"train": rows})) as process:
        code, told = end(process)
    assert code == 1
    assert "lockstep: rank 1: reading sample" in told
    assert "IndexError: row 7 is short" in told
    assert "rank 1 (host " in told  # as rank 0 tells it
    assert "this is rank 0" in told


def test_a_rank_that_is_stopped_is_named_by_the_other(tmp_path: Path) -> None:
    with launched(tmp_path, endless(tmp_path)) as process:
        wait_for_step(tmp_path, process)
        stopped = ranks(tmp_path)[1]
        os.kill(stopped, signal.SIGSTOP)
        until = time.monotonic() + _ENDED_WITHIN_SECONDS
        while 0 in ranks(tmp_path) and time.monotonic() < until:
            time.sleep(0.1)
        assert 0 not in ranks(tmp_path)
        os.kill(stopped, signal.SIGKILL)  # the launch agent would wait 30 s for it
        code, told = end(process)
    assert code == 1
    assert "lockstep: rank 1 (host " in told
    assert "silent for" in told
    assert "loss.backward" in told or "all_reduce" in told  # the stack of the rank that answers


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


def test_a_stop_file_stops_and_the_next_start_does_not_mind_it(tmp_path: Path) -> None:
    with launched(tmp_path, endless(tmp_path)) as process:
        wait_for_step(tmp_path, process)
        (tmp_path / "run" / "STOP").touch()
        code, told = end(process)
    assert code == 75, told
    assert "Stopped by the file STOP" in told
    step = json.loads((tmp_path / "run" / "outcome.json").read_text())["step"]
    assert observe(endless(tmp_path, limit={"steps": step + 2}))["outcome"] == "finished"


def test_a_second_interrupt_ends_a_run_whose_other_rank_is_stopped(tmp_path: Path) -> None:
    with launched(tmp_path, endless(tmp_path, limit={"steps": 1_000_000, "silence_seconds": 300})) as process:
        wait_for_step(tmp_path, process)
        pids = ranks(tmp_path)
        os.kill(pids[1], signal.SIGSTOP)
        os.kill(pids[0], signal.SIGINT)
        time.sleep(2.2)  # within two seconds it is taken for the same Ctrl-C
        os.kill(pids[0], signal.SIGINT)
        until = time.monotonic() + 10
        while 0 in ranks(tmp_path) and time.monotonic() < until:
            time.sleep(0.05)
        assert 0 not in ranks(tmp_path)
        os.kill(pids[1], signal.SIGKILL)
        _, told = end(process)
    assert "interrupted again; leaving without a save" in told


def test_a_rank_whose_peers_never_come_says_so_and_leaves(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(endless(tmp_path, limit={"steps": 1, "stall_seconds": 2})))
    alone = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "runtime" / "train.py"), str(path)],
        env=clean_environment(ACCELERATE_USE_CPU="true", **alone), capture_output=True, text=True, check=False, timeout=90,
    )  # fmt: skip
    assert done.returncode == 1
    assert "rank 1: the ranks did not come together at 127.0.0.1:1 within 2 s" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_rank_that_holds_the_others_up_is_named(pool: ProcessPool, tmp_path: Path) -> None:
    rows = {"target": "tiny_failing:Rows", "args": {"slow_on": 1}}
    # Weights are summed for eight steps ahead, so the data of eight steps is read at once.
    config = configuration(tmp_path, data={"train": rows}, limit={"steps": 16}, reporting={"every": "8 steps"})
    pool.run(observe, 3, config)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    reports = [record for record in records if record["event"] == "train"]
    assert [report["slowest_rank"] for report in reports] == [1, 1]
    assert all(report["slowest_rank_excess"] > 0.2 for report in reports)
    assert all(0.2 < report["data_share"] <= 1 for report in reports)
    assert sum("rank 1 holds the others up" in record.get("text", "") for record in records) == 1
