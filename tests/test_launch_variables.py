"""What a launcher, or a user in its place, says of the ranks in the environment: used, or refused in one message."""

from __future__ import annotations

import os

import pytest

from runtime import environment
from runtime.errors import WorldSizeError
from runtime.launched import run, without_local_rank

NAMES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCKSTEP_WORLD_SIZE")
MEETING = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}
OPEN_MPI_HERE = {**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
MPICH_HERE = {"PMI_SIZE": "2", "PMI_RANK": "1", "MPI_LOCALNRANKS": "2", "MPI_LOCALRANKID": "1"}


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name in NAMES or name.startswith(("OMPI_", "PMI_", "MPI_", "MV2_")):
            monkeypatch.delenv(name)
    for name in NAMES:  # what a test adds is taken out again, too
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"RANK": "0"}, "RANK"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE is '-1'"),
        ({"WORLD_SIZE": "²"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is 0"),
        ({"WORLD_SIZE": "2"}, "RANK"),
        ({"WORLD_SIZE": "2", **MEETING}, "RANK"),
        ({"WORLD_SIZE": "2", "RANK": "x", **MEETING}, "RANK is 'x'"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR"),
        ({"WORLD_SIZE": "1", "RANK": "0"}, "MASTER_ADDR"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "h"}, "MASTER_PORT"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "h", "MASTER_PORT": "abc"}, "MASTER_PORT is 'abc'"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "h", "MASTER_PORT": "70000"}, "MASTER_PORT is 70000"),
        ({"WORLD_SIZE": "2", "RANK": "2", **MEETING}, "RANK is 2"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "7", **MEETING}, "LOCAL_RANK is 7"),
        ({"WORLD_SIZE": "4", "RANK": "2", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2", **MEETING}, "LOCAL_RANK is 2"),
        ({"LOCKSTEP_WORLD_SIZE": "many"}, "LOCKSTEP_WORLD_SIZE is 'many'"),
        (OPEN_MPI, "MASTER_ADDR"),
        ({"PMI_SIZE": "2", "PMI_RANK": "0"}, "MASTER_ADDR"),
    ],
)
def test_what_is_incomplete_or_means_nothing_is_one_message_and_exit_code_2(
    variables: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(WorldSizeError, match=said):
        environment.check_launched_world_size()
    assert run("train", ["run.yaml"]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1


@pytest.mark.parametrize(
    "variables", [{}, {"WORLD_SIZE": "1"}, {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}]
)
def test_one_process_needs_to_say_nothing(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    environment.check_launched_world_size()


@pytest.mark.parametrize("variables", [OPEN_MPI_HERE, MPICH_HERE, {**OPEN_MPI, **MEETING}])
def test_mpirun_is_a_launcher(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    environment.check_launched_world_size()
    assert (environment.rank(), environment.world_size(), environment.store_address()[0]) == (1, 2, "127.0.0.1")
    if "OMPI_COMM_WORLD_LOCAL_RANK" in variables or "MPI_LOCALRANKID" in variables:
        assert environment.local_rank() == 1


def test_our_own_launcher_within_a_job_of_mpirun_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**OPEN_MPI_HERE, "LOCKSTEP_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    environment.check_launched_world_size()
    assert environment.world_size() == 1


@pytest.mark.parametrize("arguments", [[], ["--local_rank=0"], ["--strange", "run.yaml"], ["run.yaml", "--strange"]])
def test_a_command_line_without_a_configuration_is_told_how_it_goes(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", arguments) == 2
    assert "usage: accelerate launch runtime/train.py CONFIG" in capsys.readouterr().err


def test_the_rank_that_other_launchers_add_to_the_command_line_is_left_out() -> None:
    assert without_local_rank(["--local_rank=1", "--local-rank=0", "run.yaml", "seed=1"]) == ["run.yaml", "seed=1"]
