"""Where figures go."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from runtime.reporting.json_lines import JsonLines
from runtime.session import train
from tests.observed import configuration, observe
from tests.process_pool import ProcessPool
from tests.test_launch import clean_environment


def reported(folder: Path, **changes: Any) -> dict[str, Any]:
    config = configuration(
        folder,
        data={"train": {"target": "tiny:points"}, "validation": {"target": "tiny:points", "args": {"size": 30}}},
        evaluation={"every": "2 steps"},
        limit={"steps": 4},
        **changes,
    )
    config["reporting"]["every"] = "2 steps"
    return config


def test_records_name_what_they_are_and_rank_0_alone_writes_them(pool: ProcessPool, tmp_path: Path) -> None:
    pool.run(observe, 2, reported(tmp_path))
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(r["event"], r.get("step")) for r in records] == [
        ("start", 0), ("train", 2), ("evaluation", 2), ("train", 4), ("evaluation", 4),
        ("checkpoint", 4), ("end", None),
    ]  # fmt: skip
    assert (records[0]["world_size"], records[0]["slots"], records[0]["inexact"]) == (2, 4, [])
    assert {"loss", "grad_norm", "learning_rate", "samples_per_second", "epoch", "time"} <= set(records[1])
    assert records[2]["split"] == "validation"
    assert records[2]["samples"] == 30
    assert records[-1]["outcome"] == "finished"


def test_a_choice_that_is_inexact_is_in_the_first_record(tmp_path: Path) -> None:
    train(reported(tmp_path, precision="bf16"))
    first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert any("bf16" in reason for reason in first["inexact"])


def test_the_resolved_configuration_in_the_run_folder_repeats_the_run(tmp_path: Path) -> None:
    first = observe(reported(tmp_path / "first"))
    resolved = yaml.safe_load((tmp_path / "first" / "config.yaml").read_text())
    second = observe({**resolved, "output": str(tmp_path / "second")})
    assert second["losses"] == first["losses"]


def test_a_terminal_sees_a_bar_and_a_pipe_sees_plain_lines(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    config = reported(tmp_path / "run")
    config["reporting"]["progress"] = True
    path.write_text(yaml.safe_dump(config))
    script = f"from runtime.session import train; train({str(path)!r})"
    piped = subprocess.run(
        [sys.executable, "-c", script], env=clean_environment(), capture_output=True, text=True, check=True
    )
    assert "\x1b" not in piped.stdout
    assert re.search(r"epoch 1  step 2  loss \d", piped.stdout)
    assert re.search(r"step 4 .*validation", piped.stdout)

    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update(clean_environment(TERM="xterm", COLUMNS="100"))
        other = f"output={tmp_path}/other"
        os.execv(sys.executable, [sys.executable, "-c", script.replace(")", f", {other!r})")])
    shown = b""
    while True:
        try:
            chunk = os.read(terminal, 65536)
        except OSError:  # the other end is closed
            break
        if not chunk:
            break
        shown += chunk
    os.waitpid(pid, 0)
    os.close(terminal)
    assert "━".encode() in shown
    assert b"samples/s" in shown
    assert b"epoch 1" in shown
    assert b"4/4" in shown


def test_wandb_gets_one_run_for_a_run_that_was_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    config = reported(tmp_path / "run")
    config["reporting"]["wandb"] = {"project": "tests"}
    for steps in (2, 4):
        path = tmp_path / f"{steps}.yaml"
        path.write_text(yaml.safe_dump({**config, "limit": {"steps": steps}}))
        script = f"import sys; from runtime.launched import run; sys.exit(run('train', [{str(path)!r}]))"
        line = [sys.executable, "-c", script]
        subprocess.run(line, env=clean_environment(NETRC=str(tmp_path / "none")), check=True, capture_output=True)
    folders = sorted(p.name for p in (tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    assert len({name.rsplit("-", 1)[1] for name in folders}) == 1
    from runtime.checkpoints.load import load_state

    state = load_state(tmp_path / "run" / "checkpoints" / "step-00000004")[1]
    assert folders[0].endswith(state["identity"]["tracker_id"])
    found = subprocess.run(
        [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(tmp_path / "run" / "wandb" / folders[1])],
        capture_output=True, text=True, check=False, env=clean_environment(),
    )  # fmt: skip
    assert "train/loss" in found.stdout, found.stderr
    assert "validation/loss" in found.stdout


def test_a_record_that_the_disk_has_damaged_is_dropped_and_the_others_stay(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"event": "train", "step": 1}\n{"event": "tr\xa2in", "step"\n{"event": "train", "step": 2}\n')
    JsonLines(path, resumed_step=2).finish("finished")
    steps = [json.loads(line).get("step") for line in path.read_text().splitlines()]
    assert steps == [1, 2, None]


def test_the_record_of_an_evaluation_that_is_to_be_repeated_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [{"event": event, "step": step} for step in (1, 2) for event in ("train", "evaluation")]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    JsonLines(path, resumed_step=2, evaluation_due=True).finish("finished")
    assert [json.loads(line) for line in path.read_text().splitlines()][:-1] == lines[:-1]
