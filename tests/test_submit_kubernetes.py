"""``lockstep submit kubernetes``: what is asked for is what is submitted, and what cannot be is told by its key."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from runtime.cli import main
from tests.test_kubernetes import ROOT, container, documents


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "configs").mkdir()
    shutil.copy(ROOT / "configs" / "digits.yaml", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_API_KEY", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


COMMAND = ["submit", "kubernetes", "configs/digits.yaml", "--image", "lockstep:1"]
VOLUME = ["--volume", "runs:/workspace/runs"]


def test_what_is_submitted_is_what_was_asked_for(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = [*COMMAND, *VOLUME, "--nodes", "2", "--processes-per-node", "3", "--env", "A=1", "--secret", "HF_TOKEN=hub"]
    assert main([*line, "--namespace", "lab", "--time", "1:00:00", "limit.epochs=7"]) == 0
    told = capsys.readouterr()
    assert told.err == ""
    found, only = documents(told.out), container(told.out)
    assert found["ConfigMap"]["data"]["run.yaml"] == (here / "configs" / "digits.yaml").read_text()
    assert {document["metadata"]["namespace"] for document in found.values()} == {"lab"}
    assert (found["Job"]["spec"]["completions"], found["Job"]["spec"]["parallelism"]) == (2, 2)
    overrides = ["limit.epochs=7", "limit.time=3600s"]
    assert only["args"][:6] == ["python", "-m", "launch.node", "/workspace/configs/digits.yaml", *overrides]
    assert {"name": "A", "value": "1"} in only["env"]
    reference = {"secretKeyRef": {"name": "hub", "key": "HF_TOKEN"}}
    assert {"name": "HF_TOKEN", "valueFrom": reference} in only["env"]
    mounted = {mount["mountPath"]: mount.get("subPath") for mount in only["volumeMounts"]}
    assert mounted["/workspace/configs/digits.yaml"] == "run.yaml"
    assert "/dev/shm" in mounted


def test_a_secret_that_is_set_here_gets_into_no_manifest(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "hunter2")
    assert main([*COMMAND, *VOLUME]) == 0
    told = capsys.readouterr()
    assert "hunter2" not in told.out + told.err
    assert (
        told.err
        == "lockstep: WANDB_API_KEY is set here but not in the pods; to pass it, add --secret WANDB_API_KEY=SECRET\n"
    )
    assert main([*COMMAND, *VOLUME, "--secret", "WANDB_API_KEY=wandb"]) == 0
    told = capsys.readouterr()
    assert "hunter2" not in told.out
    assert told.err == ""


@pytest.mark.parametrize(
    ("arguments", "key", "what"),
    [
        (
            [],
            "output",
            "is on no writable volume, and would be lost with its pod: add --volume CLAIM:/workspace/runs",
        ),
        (["--volume", "data:/data"], "output", "is on no writable volume"),
        (["--volume", "runs:/workspace/runs:ro"], "output", "is on no writable volume"),
        ([*VOLUME, "output=/elsewhere/run"], "output", "/elsewhere/run is on no writable volume"),
        ([*VOLUME, "--volume", "more:/workspace/runs"], "--volume more:/workspace/runs", "is mounted at the same path"),
        ([*VOLUME, "--volume", "data:../data"], "--volume data:../data", "absolute path"),
        ([*VOLUME, "--volume", "A B:/data"], "--volume A B:/data", "neither the name of a PersistentVolumeClaim nor"),
        ([*VOLUME, "--env", "MY_TOKEN=x"], "MY_TOKEN", "is a secret: store it in a Secret of the cluster"),
        ([*VOLUME, "--env", "A=1\nB"], "variable 'A'", "contains a line break"),
        ([*VOLUME, "--env", "A=\udcff"], "", "contains bytes that are not valid UTF-8"),
        ([*VOLUME, "--env", "1A=1"], "'1A'", "is not a valid environment variable name"),
        ([*VOLUME, "--secret", "A=B/c"], "--secret A", "'B/c' is not a valid name of a Secret and of a key in it"),
        ([*VOLUME, "--env", "A=1", "--secret", "A=b"], "A", "is given by both --env and --secret"),
        ([*VOLUME, "--namespace", "A_b"], "--namespace", "'A_b' is not a valid namespace name"),
        ([*VOLUME, "--memory", "64 GB"], "--memory", "'64 GB' is not a quantity of memory, such as 64Gi"),
        ([*VOLUME, "--user", "0:0"], "--user", "must not be root"),
        ([*VOLUME, "--apply", "--dry-run"], "--apply", "and --dry-run contradict each other"),
        ([*VOLUME, "strategy.world_size=3"], "strategy.world_size", "is 3, but 1 nodes with 1 processes each make 1"),
        ([*VOLUME, "model={target: 'torch.nn:Identity', args: {api_key: abc}}"], "model.args.api_key", "is a secret"),
        ([*VOLUME, "limit.epoch=3"], "limit.epoch", "did you mean 'epochs'?"),
    ],
)
def test_what_cannot_be_submitted_is_told_by_key(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], key: str, what: str
) -> None:
    assert main([*COMMAND, *arguments]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert any(f"{f' {key}' if key else ''}: " in line and what in line for line in told.err.splitlines()), told.err
    assert "Traceback" not in told.err


def test_a_configuration_from_elsewhere_has_no_place_in_the_image(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "inner").mkdir()
    monkeypatch.chdir(here / "inner")
    line = ["submit", "kubernetes", "../configs/digits.yaml", "--image", "lockstep:1", *VOLUME]
    assert main(line) == 2
    assert "CONFIG: must be below the current folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value"), [("--volume", "runs"), ("--volume", "a:/b:rw"), ("--secret", "A"), ("--user", "me")]
)
def test_an_option_of_another_form_is_refused(
    here: Path, capsys: pytest.CaptureFixture[str], option: str, value: str
) -> None:
    with pytest.raises(SystemExit) as left:
        main([*COMMAND, option, value])
    assert left.value.code == 2
    assert f"{value!r} is not of the form" in capsys.readouterr().err


def with_kubectl(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    (folder / "bin").mkdir()
    (folder / "bin" / "kubectl").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "bin" / "kubectl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:/usr/bin:/bin")


def test_kubectl_is_handed_what_would_be_printed(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([*COMMAND, *VOLUME, "--dry-run"]) == 0
    printed = capfd.readouterr().out
    with_kubectl(here, monkeypatch, 'echo "$@" > words; cat > manifests; echo applied')
    assert main([*COMMAND, *VOLUME, "--apply"]) == 0
    assert (here / "manifests").read_text() == printed
    assert (here / "words").read_text() == "apply --filename -\n"
    told = capfd.readouterr()
    assert told.out == "applied\n"
    assert 'kubectl patch job digits --type merge --patch \'{"spec":{"suspend":true}}\'' in told.err


def test_what_kubectl_refuses_and_its_absence_are_told(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with_kubectl(here, monkeypatch, "cat > /dev/null; echo 'field is immutable' >&2; exit 1")
    assert main([*COMMAND, *VOLUME, "--apply"]) == 1
    told = capfd.readouterr().err
    assert told.startswith("field is immutable\nlockstep: kubectl failed to apply the manifests")
    monkeypatch.setenv("PATH", str(here))
    assert main([*COMMAND, *VOLUME, "--apply"]) == 1
    assert "--apply needs kubectl" in capfd.readouterr().err
