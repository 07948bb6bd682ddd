"""Both images, built and run: `make image-test`. Not part of `make test`: it takes minutes, podman and a network.

BASE           base image; where it is not given and cannot be pulled, one is made of Debian's packages (mmdebstrap)
TORCH_INDEX    where torch's wheels without CUDA are; default: torch's own index

The image for GPUs is built with these wheels, too: each step of its Dockerfile runs, less the gigabytes of CUDA that PyPI has.

The machine's pip configuration and certificates are lent to the build, and stay out of the image.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
IMAGE = "localhost/lockstep-image-test"
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
        pytest.fail(
            "make image-test needs podman: apt-get install podman buildah runc mmdebstrap aardvark-dns iptables"
        )
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


def built(base: str, dockerfile: str, tag: str, folder: Path) -> str:
    podman(
        *("build", "--quiet", "--pull=never", "--isolation=chroot", "--network=host", "--build-arg", f"BASE={base}"),
        *lent_to_the_build(folder),
        *("--file", str(ROOT / "docker" / dockerfile), "--tag", tag, str(ROOT)),
    )
    print(f"\nbuilt {tag}: {int(podman('image', 'inspect', '--format', '{{.Size}}', tag)) / 1e9:.2f} GB")
    return tag


@pytest.fixture(scope="session")
def image(base: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return built(base, "Dockerfile.cpu", f"{IMAGE}:cpu", tmp_path_factory.mktemp("pip"))


@pytest.fixture(scope="session")
def gpu_image(base: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return built(base, "Dockerfile", f"{IMAGE}:gpu", tmp_path_factory.mktemp("pip"))


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


TRAIN = ["python", "-m", "launch.node", "configs/digits.yaml", "reporting.progress=false"]


@pytest.mark.parametrize("which", ["image", "gpu_image"])
def test_an_image_is_nobodys_root_and_has_nothing_left_over(
    which: str, runs: str, request: pytest.FixtureRequest
) -> None:
    image = request.getfixturevalue(which)
    flags = "python -c 'import sys, torch, runtime, launch; print(sys.flags.safe_path)'"
    written = "find /opt /etc /usr -xdev -writable -not -type l | head -n 5"
    said = inside(image, runs, "bash", "-c", f"id -u; id -g; cat /proc/1/comm; {flags}; {written}").splitlines()
    print(*said, sep="\n")
    assert said == ["1000", "1000", "tini", "True"]
    caches = "/root/.cache /home/lockstep/.cache /var/lib/apt/lists/* /var/cache/apt/* /tmp/* /build"
    look = f"shopt -s nullglob; for path in {caches}; do test -e $path && echo $path; done; true"
    assert podman("run", "--rm", "--user=0:0", *RUN, image, "bash", "-c", look) == ""
    assert "COMMAND" in podman("run", "--rm", *RUN, image)  # the help


def test_the_image_for_cpus_has_no_cuda(image: str, runs: str) -> None:
    assert inside(image, runs, "python", "-c", "import torch; print(torch.version.cuda)") == "None"


def test_the_image_for_gpus_tracks_runs_and_compiles_what_launches_kernels(gpu_image: str, runs: str) -> None:
    source = '#include <dlfcn.h>\n#include <stdio.h>\nint main(void) { return puts(dlerror() ? "" : "compiled") < 0; }'
    script = f"printf %s {shlex.quote(source)} | gcc -x c -o /tmp/compiled - && /tmp/compiled"
    assert inside(gpu_image, runs, "bash", "-c", script) == "compiled"
    assert inside(gpu_image, runs, "python", "-c", "import wandb; print('tracked')") == "tracked"
    variables = inside(gpu_image, runs, "env").splitlines()
    assert {"NVIDIA_VISIBLE_DEVICES=all", "NVIDIA_DRIVER_CAPABILITIES=compute,utility"} <= {*variables}
    with pytest.raises(AssertionError, match="1 GPUs were requested, but torch can use 0 on this machine"):
        podman("run", "--rm", *RUN, gpu_image, *TRAIN, "--gpus")


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


class Composed:
    """The two machines of compose.yaml, under a name of their own, by podman-compose in the place of docker's."""

    def __init__(self, image: str) -> None:
        self.name = f"lockstep-image-test-{os.getpid()}"
        self.runs = f"{self.name}_runs"
        self._line = [sys.executable, "-m", "podman_compose", "--project-name", self.name]
        self._line += ["--file", str(ROOT / "docker" / "compose.yaml")]
        self._environment = {**os.environ, "IMAGE": image}

    def call(self, *words: str) -> str:
        # The network is the project's own: there, the machines know each other by name.
        flags = " ".join(flag for flag in RUN if not flag.startswith("--network"))
        done = subprocess.run(
            [*self._line, f"--podman-run-args={flags}", *words],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
            check=False,
            env=self._environment,
        )
        assert done.returncode == 0, f"{words}\n{done.stdout}{done.stderr}"
        return done.stdout

    def codes(self) -> list[int]:
        """Wait for both; return how they ended."""
        return [int(podman("wait", f"{self.name}_node-{rank}_1")) for rank in range(2)]

    def wait_until_trained(self) -> None:
        with subprocess.Popen(
            ["podman", "logs", "--follow", f"{self.name}_node-0_1"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as follower:
            assert follower.stdout is not None
            alarm = threading.Timer(300, follower.kill)
            alarm.start()
            trained = any(text.startswith(b"epoch ") for text in follower.stdout)
            alarm.cancel()
            follower.kill()
        assert trained, podman("logs", f"{self.name}_node-0_1")


@pytest.fixture
def composed(image: str) -> Iterator[Composed]:
    found = Composed(image)
    yield found
    found.call("down", "--volumes", "--timeout", "0")


def test_the_machines_of_compose_stop_go_on_and_end_with_the_bits_of_two_processes(
    image: str, composed: Composed
) -> None:
    composed.call("up", "--no-build", "--detach")
    composed.wait_until_trained()
    composed.call("stop")  # within stop_grace_period, or SIGKILL (137)
    assert composed.codes() == [75, 75]
    stopped = json.loads(inside(image, composed.runs, "cat", "runs/compose/outcome.json"))
    print("stopped:", stopped)
    assert 0 < stopped["step"] < 460
    composed.call("up", "--no-build", "--detach")
    assert composed.codes() == [0, 0]
    said = inside(
        image, composed.runs, "lockstep", "train", "configs/digits.yaml", "--processes", "2", "output=runs/two"
    )
    assert "accuracy" in said
    hashes = "cd runs/$0/checkpoints/step-00000460* && sha256sum *.safetensors"
    first, second = (inside(image, composed.runs, "bash", "-c", hashes, name) for name in ("compose", "two"))
    print(first)
    assert len(first.splitlines()) == 2
    assert first == second
