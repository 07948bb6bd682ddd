"""Two hosts, made of network namespaces, whose link is cut: both sides leave within the limit and name who is lost."""

from __future__ import annotations

import ipaddress
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml

from tests.chaos.nursery import Nursery
from tests.chaos.processes import clean_environment, free_port
from tests.forked import Forked
from tests.observed import PROJECT, configuration, observe
from tests.process_pool import ProcessPool
from tests.test_failure import endless

ETC = Path("/etc/netns")  # whose files a namespace sees in /etc


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    """Two hosts, 10.77.7.1 and 10.77.7.2, joined by one link and to nothing else.

    The first one's own name means loopback to itself, as Debian has it, and its address to the second one.
    """
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("making hosts of network namespaces needs root and the command ip (iproute2)")
    first, second = names = (f"h1-{os.getpid()}", f"h2-{os.getpid()}")
    try:
        ip("netns", "add", first)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespace can be made here: {error.stderr}")
    try:
        ip("netns", "add", second)
        ip("link", "add", "eth0", "netns", first, "type", "veth", "peer", "name", "eth0", "netns", second)
        for number, name in enumerate(names, start=1):
            ip("-n", name, "addr", "add", f"10.77.7.{number}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", name, "link", "set", device, "up")
            (ETC / name).mkdir(parents=True)
            own = "127.0.1.1" if name == first else "10.77.7.1"
            (ETC / name / "hosts").write_text(f"127.0.0.1 localhost\n{own} {first}\n")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)
            shutil.rmtree(ETC / name, ignore_errors=True)


def on(host: str, config: Path, node_rank: int, address: str, port: int, *words: str) -> subprocess.Popen[str]:
    """Run ``lockstep train`` as on a host; nothing is said about its network interface."""
    line = [sys.executable, "-m", "runtime.cli", "train", str(config), "--nodes", "2", "--node-rank", str(node_rank)]
    line += ["--main-address", address, "--main-port", str(port), *words]
    inside = ["ip", "netns", "exec", host, "unshare", "--uts", "bash", "-c", 'hostname "$0"; exec "$@"', host, *line]
    return subprocess.Popen(
        inside, env=clean_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=config.parent
    )


def together(hosts: tuple[str, str], config: Path, *words: str, address: str = "10.77.7.1") -> list[tuple[int, str]]:
    """Train on two hosts; return exit code and output of each."""
    port = free_port()
    processes = [on(host, config, rank, address, port, *words) for rank, host in enumerate(hosts)]
    try:
        said = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


def listening(pid: int) -> set[str]:
    """Return the addresses at which anything listens on a process's host."""
    words = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
    found = {word[1].partition(":")[0] for word in words if word[3] == "0A"}
    return {str(ipaddress.ip_address(int(address, 16).to_bytes(4, "little"))) for address in found}


def test_two_hosts_train_what_one_machine_trains(hosts: tuple[str, str], pool: ProcessPool, tmp_path: Path) -> None:
    config = configuration(tmp_path / "run", limit={"steps": 6})
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**config, "limit": {"steps": 3}}))
    ended = together(hosts, path)
    assert [code for code, _ in ended] == [0, 0], ended
    ended = together(hosts, path, "limit.steps=6", address=hosts[0])  # goes on, at once
    assert [code for code, _ in ended] == [0, 0], ended
    pool.run(observe, 2, {**config, "output": str(tmp_path / "reference")})
    (found,), (expected,) = (
        list((tmp_path / name / "checkpoints").glob("step-00000006*")) for name in ("run", "reference")
    )
    for name in ("model.safetensors", "training.safetensors"):
        assert (found / name).read_bytes() == (expected / name).read_bytes()


def test_hosts_with_different_code_are_told_apart(hosts: tuple[str, str], nursery: Nursery, tmp_path: Path) -> None:
    place = {"address": "10.77.7.1", "port": free_port()}
    with ExitStack() as stack:
        started = []
        for rank, host in enumerate(hosts):
            folder = tmp_path / host
            shutil.copytree(PROJECT, folder)
            (folder / "tiny_own.py").write_text(f"LAYERS = {rank}\n")
            config = {**configuration(tmp_path / "run"), "code": "."}
            started.append(stack.enter_context(Forked(nursery, folder, config, 2, own=[rank], host=host, **place)))
        for run in started:
            run.wait_for_end()
        for run in started:
            assert run.told().count(f"rank 1 (host {hosts[1]}) has code '") == 1
            assert f"rank 0 (host {hosts[0]})" in run.told()
    assert not list(tmp_path.glob("run/checkpoints/step-*"))


def test_when_the_link_between_two_hosts_is_cut_both_leave_and_name_who_is_lost(
    hosts: tuple[str, str], nursery: Nursery, tmp_path: Path
) -> None:
    first, second = hosts
    config = endless(tmp_path, limit={"steps": 1_000_000, "silence_seconds": 2})
    port = free_port()
    place = {"address": "10.77.7.1", "port": port}
    with (
        Forked(nursery, tmp_path, config, 2, own=[0], host=first, **place) as one,
        Forked(nursery, tmp_path, config, 2, own=[1], host=second, **place) as other,
    ):
        one.wait_for_step(20)
        assert other.alive
        assert listening(one.ranks()[0]) == {"10.77.7.1"}
        assert listening(other.ranks()[1]) == {"10.77.7.2"}
        ip("-n", second, "link", "set", "eth0", "down")
        one.wait_for_end()
        other.wait_for_end()
        assert f"lockstep: rank 1 (host {second}), in " in one.told()
        assert "cannot reach the store (noticed by rank 0); this is rank 0" in one.told()
        lost = (
            f"lockstep: the store on 10.77.7.1:{port}, which rank 0 or its launch agent hosts, is silent for 2 s: its "
        )
        assert lost in other.told()
        assert f"this is rank 1 (host {second}), in " in other.told()
        for said in (one.told(), other.told()):
            # where the rank that leaves stood
            assert "all_reduce" in said or "backward" in said or "work.wait()" in said
        assert one.outcome()["outcome"] == "failed"
        assert one.outcome()["message"].startswith(f"rank 1 (host {second}), in ")
