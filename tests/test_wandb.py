"""W&B online, without its own server: a run never waits for it for long, and never loses its record."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.observed import configuration
from tests.test_launch import clean_environment
from tests.wandb_server import wandb_server

pytest.importorskip("wandb", reason="needs the extra wandb")
ROOT = Path(__file__).parent.parent


def started(folder: Path, url: str) -> tuple[subprocess.CompletedProcess[str], list[dict[str, Any]]]:
    config = configuration(folder / "run", limit={"steps": 3})
    config["reporting"]["wandb"] = True
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    done = subprocess.run(
        [sys.executable, str(ROOT / "runtime" / "train.py"), str(folder / "run.yaml")],
        env=clean_environment(
            WANDB_API_KEY="a" * 40, WANDB_MODE="online", WANDB_BASE_URL=url, ACCELERATE_USE_CPU="true"
        ),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return done, records


def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def test_without_a_server_the_run_is_recorded_offline_and_says_how_to_upload_it(tmp_path: Path) -> None:
    done, records = started(tmp_path, f"http://127.0.0.1:{closed_port()}")
    assert done.returncode == 0, done.stderr
    assert [r["step"] for r in records if r["event"] == "train"] == [1, 2, 3]
    warned = [line for line in done.stdout.splitlines() if "recorded offline" in line]
    assert len(warned) == 1
    folder = re.search(r"wandb sync (\S+)", done.stdout)
    assert folder is not None
    assert [*Path(folder[1]).glob("*.wandb")], "the folder that is named holds the record"


def test_with_a_server_every_row_arrives(tmp_path: Path) -> None:
    with wandb_server() as (url, rows):
        done, _ = started(tmp_path, url)
    assert done.returncode == 0, done.stderr
    assert "W&B" not in done.stdout
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2, 3]
