"""The CPU image, built and run: `make image-test`. Not part of `make test`: it takes minutes, podman and a network.

BASE           base image; where it is not given and cannot be pulled, one is made of Debian's packages (mmdebstrap)
TORCH_INDEX    where torch's wheels without CUDA are; default: torch's own index

The machine's pip configuration and certificates are lent to the build, and stay out of the image.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
IMAGE = "localhost/lockstep-image-test:cpu"
OFFICIAL = "docker.io/library/python:3.12.12-slim-bookworm"
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
# What podman needs to run as root within another container: no cgroups of its own, and the limits that are there.
RUN = ["--network=host", "--ulimit=nofile=1024:1024", "--ulimit=nproc=4096:4096"]
RUN += [f"--runtime={shutil.which('runc')}"] if shutil.which("runc") else []
TIMEOUT_SECONDS = 900


def podman(*words: str, check: bool = True) -> str:
    done = subprocess.run(["podman", *words], capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
    assert done.returncode == 0 or not check, f"podman {' '.join(words)}\n{done.stdout}{done.stderr}"
    return done.stdout.strip()


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    if shutil.which("podman") is None:
        pytest.fail("make image-test needs podman: apt-get install podman buildah runc mmdebstrap")
    if given := os.environ.get("BASE"):
        return given
    pulled = subprocess.run(["podman", "pull", "--quiet", OFFICIAL], capture_output=True, timeout=300, check=False)
    if pulled.returncode == 0:
        return OFFICIAL
    made = "localhost/lockstep-image-test-base:bookworm"
    if subprocess.run(["podman", "image", "exists", made], check=False).returncode == 0:
        return made
    archive = tmp_path_factory.mktemp("base") / "base.tar"
    packages = "--include=ca-certificates,python3,python3-venv"
    subprocess.run(
        ["mmdebstrap", "--quiet", "--variant=minbase", packages, "bookworm", archive], check=True, timeout=600
    )
    podman("import", "--quiet", str(archive), made)
    archive.unlink()
    return made


def lent_to_the_build(folder: Path) -> Iterator[str]:
    """Yield podman's options that let pip find in the build what it finds on this machine."""
    asked = subprocess.run(
        [sys.executable, "-m", "pip", "config", "debug"], capture_output=True, text=True, check=False
    )
    merged = ConfigParser()
    merged.read(line.split(",")[0].strip() for line in asked.stdout.splitlines() if line.endswith("exists: True"))
    if not merged.has_section("global"):
        merged.add_section("global")
    if CERTIFICATES.exists():
        yield from ("--volume", f"{CERTIFICATES}:{CERTIFICATES}:ro")
        merged["global"]["cert"] = str(CERTIFICATES)
    words = [word.removeprefix("file://") for value in merged["global"].values() for word in value.split()]
    folders = {Path(word) for word in words if Path(word).is_dir()}
    for path in sorted({Path(*path.parts[:3]) for path in folders}):  # an index leads to files beside it
        yield from ("--volume", f"{path}:{path}:ro")
    index = os.environ.get("TORCH_INDEX")
    if index is None and any(path.glob("torch-*+cpu-*.whl") for path in folders):
        index = "https://pypi.org/simple"  # the wheel without CUDA is here, and wins by its local version
    if index is not None:
        yield from ("--build-arg", f"TORCH_INDEX={index}")
    with (folder / "pip.conf").open("w") as file:
        merged.write(file)
    yield from ("--volume", f"{folder / 'pip.conf'}:/etc/pip.conf:ro")


@pytest.fixture(scope="session")
def image(base: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    podman(
        *("build", "--quiet", "--pull=never", "--isolation=chroot", "--network=host", "--build-arg", f"BASE={base}"),
        *lent_to_the_build(tmp_path_factory.mktemp("pip")),
        *("--file", str(ROOT / "docker" / "Dockerfile.cpu"), "--tag", IMAGE, str(ROOT)),
    )
    print(f"\nbuilt {IMAGE}: {int(podman('image', 'inspect', '--format', '{{.Size}}', IMAGE)) / 1e9:.2f} GB")
    return IMAGE


@pytest.fixture
def runs() -> Iterator[str]:
    """A volume for the run folder."""
    name = f"lockstep-image-test-{os.getpid()}"
    podman("volume", "create", name)
    yield name
    podman("volume", "rm", "--force", name)


def inside(image: str, runs: str, *command: str) -> str:
    return podman("run", "--rm", *RUN, "--volume", f"{runs}:/workspace/runs", image, *command)


class Container:
    """A training run in a container, whose words are collected."""

    def __init__(self, image: str, runs: str, *command: str) -> None:
        mounted = ["--volume", f"{runs}:/workspace/runs", "--env", "OMP_NUM_THREADS=1"]
        self.id = podman("run", "--detach", *RUN, *mounted, image, *command)
        self.said: list[str] = []
        self.trained = threading.Event()
        self._follower = subprocess.Popen(
            ["podman", "logs", "--follow", self.id], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._follower.stdout is not None
        with self._follower.stdout as lines:
            for text in lines:
                self.said.append(text.rstrip())
                if text.startswith("epoch "):
                    self.trained.set()
        self.trained.set()

    def code(self) -> int:
        return int(podman("wait", self.id))

    def remove(self) -> None:
        podman("rm", "--force", self.id, check=False)
        self._follower.wait(60)
        self._reader.join(60)


TRAIN = ["python", "-m", "runtime.processes.node", "configs/digits.yaml", "reporting.progress=false"]


def test_the_image_is_nobodys_root_and_has_nothing_left_over(image: str, runs: str) -> None:
    flags = "python -c 'import sys, torch; print(sys.flags.safe_path, torch.version.cuda)'"
    written = "find /opt /etc /usr -xdev -writable -not -type l | head -n 5"
    said = inside(image, runs, "bash", "-c", f"id -u; id -g; cat /proc/1/comm; {flags}; {written}").splitlines()
    print(*said, sep="\n")
    assert said == ["1000", "1000", "tini", "True None"]
    caches = "/root/.cache /home/lockstep/.cache /var/lib/apt/lists/* /var/cache/apt/* /tmp/* /build"
    look = f"shopt -s nullglob; for path in {caches}; do test -e $path && echo $path; done; true"
    assert podman("run", "--rm", "--user=0:0", *RUN, image, "bash", "-c", look) == ""


def test_digits_train_and_a_stopped_container_has_saved_and_goes_on(image: str, runs: str) -> None:
    container = Container(image, runs, *TRAIN, "limit.epochs=1000000")
    try:
        assert container.trained.wait(300)
        podman("stop", "--time", "270", container.id)  # SIGTERM, and SIGKILL (137) if that does not do
        assert container.code() == 75, container.said
    finally:
        container.remove()
    print(*container.said, sep="\n")
    outcome = json.loads(inside(image, runs, "cat", "runs/digits/outcome.json"))
    assert (outcome["outcome"], outcome["exit_code"], outcome["reason"]) == ("stopped", 75, "SIGTERM")
    table = json.loads(inside(image, runs, "lockstep", "checkpoints", "runs/digits", "--json"))
    print(json.dumps(outcome), json.dumps(table)[:300], sep="\n")
    assert f"step-{outcome['step']:08}" in json.dumps(table)
    epochs = outcome["step"] // 23 + 2
    said = inside(image, runs, *TRAIN, f"limit.epochs={epochs}")
    finished = json.loads(inside(image, runs, "cat", "runs/digits/outcome.json"))
    assert (finished["outcome"], finished["step"]) == ("finished", 23 * epochs), said


def test_two_containers_train_together_and_when_one_is_stopped_both_have_saved(image: str, runs: str) -> None:
    together = [
        *TRAIN,
        "limit.epochs=1000000",
        "output=runs/two",
        "--nodes",
        "2",
        "--main-port",
        "29571",
        "--node-rank",
    ]
    containers = [Container(image, runs, *together, str(rank)) for rank in range(2)]
    try:
        assert containers[0].trained.wait(300)
        podman("stop", "--time", "270", containers[1].id)
        assert [container.code() for container in containers] == [75, 75], [container.said for container in containers]
    finally:
        for container in containers:
            container.remove()
    print(*containers[0].said, sep="\n")
    assert json.loads(inside(image, runs, "cat", "runs/two/outcome.json"))["outcome"] == "stopped"
