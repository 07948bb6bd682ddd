"""``lockstep doctor``: what it finds is so, and each host that differs or lacks something is named."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
import sys
from contextlib import chdir
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from runtime.distributed.rank_consistency import code_digest
from runtime.errors import RanksDifferError
from runtime.run.diagnosis import RankReport, problems_of
from runtime.session import examine, train
from tests.observed import PROJECT, configuration
from tests.process_pool import ProcessPool, RemoteError
from tests.test_launch import clean_environment, written

WELL = RankReport(
    rank=0,
    host="a",
    python="3.11.7",
    torch="2.13.0",
    accelerate="1.15.0",
    lockstep="0.1.0",
    device="cpu",
    code="0a",
    cores=8,
    disk_bytes=10**12,
    shared_bytes=10**10,
    sees_folder=True,
)
OTHER = replace(WELL, rank=1, host="b")


def test_ranks_that_are_alike_are_well() -> None:
    assert list(problems_of([WELL, OTHER], num_workers=4, folder=Path("/runs"))) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"python": "3.12.1"}, "rank 1 (host b) has python 3.12.1, rank 0 (host a) 3.11.7"),
        ({"torch": "2.11.0"}, "rank 1 (host b) has torch 2.11.0, rank 0 (host a) 2.13.0"),
        ({"accelerate": "1.16"}, "rank 1 (host b) has accelerate 1.16, rank 0 (host a) 1.15.0"),
        ({"lockstep": "0.2.0"}, "rank 1 (host b) has lockstep 0.2.0, rank 0 (host a) 0.1.0"),
        ({"device": "NVIDIA A100"}, "rank 1 (host b) has device NVIDIA A100, rank 0 (host a) cpu"),
        ({"code": "0b"}, "rank 1 (host b) has code 0b, rank 0 (host a) 0a"),
        ({"sees_folder": False}, "rank 1 (host b) does not see in /runs what rank 0 (host a) writes there"),
        ({"disk_bytes": 5 * 10**8}, "rank 1 (host b) has 476.8 MiB of disk left in /runs"),
        ({"shared_bytes": 64 << 20}, "rank 1 (host b) has 64.0 MiB of shared memory (/dev/shm), too little"),
    ],
)
def test_what_is_wrong_is_told_with_its_host(change: dict[str, Any], message: str) -> None:
    (problem,) = problems_of([WELL, replace(OTHER, **change)], num_workers=4, folder=Path("/runs"))
    assert problem.startswith(message)


def test_little_shared_memory_is_enough_without_loader_workers() -> None:
    little = replace(OTHER, shared_bytes=64 << 20)
    assert list(problems_of([WELL, little], num_workers=0, folder=Path("/runs"))) == []


def examined(config: dict[str, Any], folders: list[str] | None = None) -> dict[str, Any]:
    if folders is not None:
        config = {**config, "output": folders[int(os.environ["RANK"])]}
    found = examine(config)
    assert found.network is not None
    return {"findings": [asdict(finding) for finding in found.findings], "network": asdict(found.network)}


def test_each_rank_is_found_as_it_is(pool: ProcessPool, tmp_path: Path) -> None:
    first, second = pool.run(examined, 2, configuration(tmp_path / "run"))
    assert first["findings"] == second["findings"]
    for rank, found in enumerate(first["findings"]):
        assert (found["rank"], found["host"], found["python"]) == (
            rank,
            socket.gethostname(),
            platform.python_version(),
        )
        assert found["code"] == code_digest(Path(PROJECT))
        assert abs(found["disk_bytes"] - shutil.disk_usage(tmp_path).free) < 1 << 32
    assert 0 < first["network"]["latency_seconds"] < 10
    assert first["network"]["bytes_per_second"] > 1e6
    assert list(tmp_path.iterdir()) == []  # the run folder was not made, and nothing is left beside it


def test_a_run_folder_that_is_not_shared_is_found(pool: ProcessPool, tmp_path: Path) -> None:
    folders = [str(tmp_path / name / "run") for name in ("a", "b")]
    for folder in folders:
        Path(folder).parent.mkdir()
    with pytest.raises(RemoteError, match=r"rank 1 \(host .*\) does not see in .*/a what rank 0"):
        pool.run(examined, 2, configuration(tmp_path), folders)


def trained(config: dict[str, Any], folders: list[str]) -> None:
    """Train in a folder that is the same path on each rank, and not the same folder."""
    message = r"rank 1 .* has a run folder shared with rank 0 False, rank 0 .* True"
    with chdir(folders[int(os.environ["RANK"])]), pytest.raises(RanksDifferError, match=message):
        train({**config, "output": "run"})


def test_a_run_does_not_start_where_its_folder_is_not_shared(pool: ProcessPool, tmp_path: Path) -> None:
    folders = [str(tmp_path / name) for name in ("a", "b")]
    for folder in folders:
        Path(folder).mkdir()
    pool.run(trained, 2, configuration(tmp_path), folders)


def test_lockstep_doctor_starts_the_processes_and_tells_what_they_find(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "runtime.cli", "doctor", str(written(tmp_path)), "--processes", "2"]
    done = subprocess.run(line, env=clean_environment(), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [one.split("  ")[0] for one in lines] == ["rank 0", "rank 1", "all-reduce", "no problems found"]
    assert not (tmp_path / "run").exists()


def test_a_mistake_in_the_yaml_is_told_before_anything_starts(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "runtime.cli", "doctor", str(written(tmp_path)), "limit.stepss=3"]
    done = subprocess.run(line, env=clean_environment(), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "did you mean 'steps'" in done.stderr
    assert done.stdout == ""
