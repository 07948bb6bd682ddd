"""Two hosts, made of network namespaces, whose link is cut: both sides leave within the limit and name who is lost."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.nursery import Nursery
from tests.chaos.processes import free_port
from tests.forked import Forked
from tests.test_failure import endless


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    """Two hosts, 10.77.7.1 and 10.77.7.2, joined by one link and to nothing else."""
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
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


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
            assert "all_reduce" in said or "backward" in said  # where the rank that leaves stood
        assert one.outcome()["outcome"] == "failed"
        assert one.outcome()["message"].startswith(f"rank 1 (host {second}), in ")
