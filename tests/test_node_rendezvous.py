"""Machines that meet before they start: all go, or all end with one message that says which of them is the reason."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from launch.node_rendezvous import NodeInfo, rendezvous
from launch.slurm.step import place_in_step
from launch.slurm.variables import slurm_step
from runtime.cli import main
from runtime.distributed.network_interface import _addresses, interface_to
from runtime.errors import RendezvousError
from tests.chaos.processes import free_port
from tests.test_launch import written


def met(*places: NodeInfo, timeout_seconds: float = 20.0) -> list[str]:
    """Let machines meet, each in a thread; return their tokens, or what they say instead."""

    def one(place: NodeInfo) -> str:
        try:
            return rendezvous(place, timeout_seconds=timeout_seconds)[1]
        except RendezvousError as error:
            return f"error: {error}"

    with ThreadPoolExecutor(len(places)) as threads:
        return list(threads.map(one, places))


def test_all_get_the_same_token_in_whatever_order_they_come() -> None:
    port = free_port()
    tokens = met(*(NodeInfo(3, rank, "127.0.0.1", port, 2) for rank in (2, 0, 1)))
    assert len(set(tokens)) == 1
    assert not tokens[0].startswith("error")
    again = met(*(NodeInfo(3, rank, "127.0.0.1", port, 2) for rank in (0, 1, 2)))  # the port is free at once
    assert len(set(again)) == 1
    assert again[0] != tokens[0]


def test_a_machine_with_another_number_of_processes_is_named_on_all() -> None:
    port = free_port()
    places = [NodeInfo(3, rank, "127.0.0.1", port, processes) for rank, processes in enumerate((2, 4, 2))]
    said = met(*places, timeout_seconds=3)  # for the third, which may come when the first has left
    host = socket.gethostname()
    expected = (
        f"error: host {host} (node rank 1) was started with other options than host {host}: --processes 4 there, 2 here"
    )
    assert said[:2] == [expected, expected]


def test_a_machine_that_was_told_another_number_of_machines_is_named() -> None:
    port = free_port()
    said = met(NodeInfo(2, 0, "127.0.0.1", port, 1), NodeInfo(3, 1, "127.0.0.1", port, 1))
    assert all("--nodes 3 there, 2 here" in one for one in said)


def test_two_machines_of_one_rank_are_named() -> None:
    port = free_port()
    said = met(*(NodeInfo(3, rank, "127.0.0.1", port, 1) for rank in (0, 1, 1)))
    assert "were both started as node rank 1" in said[0]


def test_a_machine_that_does_not_come_is_named_in_bounded_time() -> None:
    port = free_port()
    said = met(NodeInfo(3, 0, "127.0.0.1", port, 1), NodeInfo(3, 1, "127.0.0.1", port, 1), timeout_seconds=1.0)
    assert f"node rank 2 of 3 machines did not connect to 127.0.0.1:{port} within 1 s" in said[0]
    assert said[1] == said[0] or "cannot be reached" in said[1]


def test_a_main_host_that_is_not_there_is_told_in_bounded_time() -> None:
    port = free_port()
    (said,) = met(NodeInfo(2, 1, "127.0.0.1", port, 1), timeout_seconds=1.0)
    assert f"the main host 127.0.0.1:{port} cannot be reached from host {socket.gethostname()}" in said
    assert "Connection refused" in said
    assert "--main-port" in said
    (said,) = met(NodeInfo(2, 1, "no-such-host.invalid", port, 1), timeout_seconds=1.0)
    assert "the main host no-such-host.invalid:" in said


def test_another_program_at_that_port_is_told() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        (said,) = met(NodeInfo(2, 0, "127.0.0.1", port, 1))
        assert "Address already in use" in said
        assert "choose another --main-port on all machines" in said


def test_the_first_machine_must_be_the_main_host() -> None:
    (said,) = met(NodeInfo(2, 0, "192.0.2.1", free_port(), 1))  # an address of no machine
    assert "192.0.2.1 is not an address of this machine" in said


def test_who_else_knocks_is_no_machine_of_ours() -> None:
    port = free_port()
    with ThreadPoolExecutor(3) as threads:
        first = threads.submit(rendezvous, NodeInfo(2, 0, "127.0.0.1", port, 1), timeout_seconds=20.0)
        for text in (b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b'{"hello": "lockstep"}\n', b""):
            with connected(port) as knocking:
                knocking.sendall(text)
        second = threads.submit(rendezvous, NodeInfo(2, 1, "127.0.0.1", port, 1), timeout_seconds=20.0)
        assert first.result()[1] == second.result()[1]


def connected(port: int) -> socket.socket:
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port))
        except ConnectionRefusedError:  # the first machine is about to listen
            continue


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nodes", "2"], "--node-rank: must be 0 to 1"),
        (["--nodes", "2"], "--main-address: is required"),
        (["--nodes", "2", "--node-rank", "2", "--main-address", "h"], "--node-rank: must be 0 to 1"),
        (["--node-rank", "1"], "--node-rank: needs --nodes 2"),
        (["--nodes", "2", "strategy.world_size=3"], "is 3, which is not divisible by 2 machines"),
    ],
)
def test_options_that_make_no_place_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["train", str(written(tmp_path)), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("port", ["0", "70000", "-1", "a"])
def test_a_port_that_is_none_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], port: str) -> None:
    place = ["--nodes", "2", "--node-rank", "1", "--main-address", "h", f"--main-port={port}"]
    with pytest.raises(SystemExit) as left:
        main(["train", str(written(tmp_path)), *place])
    assert left.value.code == 2
    assert f"--main-port: must be 1 to 65535, not '{port}'" in capsys.readouterr().err


# A step of Slurm's


def in_step(monkeypatch: pytest.MonkeyPatch, *, nodes: int, tasks: int) -> None:
    variables = {
        "STEP_NUM_NODES": nodes,
        "STEP_NUM_TASKS": tasks,
        "NODEID": 1,
        "STEP_NODELIST": "n[1-2]",
        "JOB_ID": 40007,
    }
    for name, value in variables.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))


def with_scontrol(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    (folder / "scontrol").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


SCONTROL = """\
case "$*" in
  "show hostnames n[1-2]") echo n1; echo n2;;
  "-o show node n1") echo "NodeName=n1 Arch=x NodeAddr=10.1.2.3 NodeHostName=n1";;
  *) exit 1;;
esac"""


def test_slurm_says_which_machine_of_a_step_this_is_and_where_the_first_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_step(monkeypatch, nodes=2, tasks=2)
    with_scontrol(tmp_path, monkeypatch, SCONTROL)
    step = slurm_step()
    assert step is not None
    assert place_in_step(step, processes=3, port=None) == NodeInfo(2, 1, "10.1.2.3", 10007, 3)
    assert place_in_step(step, processes=3, port=77) == NodeInfo(2, 1, "10.1.2.3", 77, 3)
    assert place_in_step(replace(step, tasks=1, nodes=1), processes=3, port=None) is None


@pytest.mark.parametrize(
    ("tasks", "script", "code", "message"),
    [
        (4, SCONTROL, 2, "srun: started 4 tasks on 2 machine(s), but one task must start all processes of a machine"),
        (
            2,
            "echo no such node >&2; exit 1",
            1,
            "does not give the first node of this step: no such node: give --nodes,",
        ),
        (2, None, 1, "scontrol cannot be run to find its first node"),
    ],
)
def test_a_step_that_makes_no_place_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tasks: int,
    script: str | None,
    code: int,
    message: str,
) -> None:
    in_step(monkeypatch, nodes=2, tasks=tasks)
    if script is None:
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        with_scontrol(tmp_path, monkeypatch, script)
    assert main(["doctor", str(written(tmp_path))]) == code
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_a_command_line_that_says_which_machine_this_is_needs_no_slurm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    in_step(monkeypatch, nodes=2, tasks=4)
    assert main(["train", str(written(tmp_path)), "--nodes", "2"]) == 2
    assert "--main-address: is required" in capsys.readouterr().err


def test_a_meeting_that_fails_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, limit={"steps": 1, "start_seconds": 1})
    place = ["--nodes", "2", "--node-rank", "1", "--main-address", "127.0.0.1", "--main-port", str(free_port())]
    assert main(["train", str(path), *place]) == 1
    said = capsys.readouterr().err
    assert said.startswith("lockstep: the main host 127.0.0.1:")
    assert said.count("\n") == 1


def test_a_main_host_whose_own_name_means_loopback_is_met_at_the_address_that_others_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    port, outward = free_port(), next((a for a in _addresses().values() if not a.startswith("127.")), None)
    if outward is None:
        pytest.skip("this machine has no address but loopback")
    real = socket.getaddrinfo
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda host, *more, **options: real("127.0.1.1" if host == "main" else host, *more, **options),
    )
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(rendezvous, NodeInfo(2, 0, "main", port, 1), timeout_seconds=20.0)
        second = threads.submit(rendezvous, NodeInfo(2, 1, outward, port, 1), timeout_seconds=20.0)
        assert first.result() == (NodeInfo(2, 0, outward, port, 1), second.result()[1])


def test_loopback_is_left_to_gloo() -> None:
    assert interface_to("127.0.0.1") is None
    assert interface_to("no-such-host.invalid") is None
