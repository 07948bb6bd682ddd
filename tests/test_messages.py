"""Messages go through the logger ``lockstep``: printed as by the command line unless the caller has configured logging."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runtime.cli import main
from runtime.messages import MessageHandler, print_run_messages_by, show_messages, shown_messages
from runtime.session import train
from tests.observed import configuration

LOGGER = logging.getLogger("lockstep")


class Kept(logging.Handler):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[tuple[str, str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append((record.name, record.levelname, record.getMessage()))


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    root = logging.getLogger()
    kept = [(logger, logger.level, logger.propagate, logger.handlers[:]) for logger in (LOGGER, root)]
    assert not LOGGER.handlers
    yield
    for logger, level, propagate, handlers in kept:
        logger.setLevel(level)
        logger.propagate, logger.handlers = propagate, handlers


def warning_run(folder: Path) -> dict[str, Any]:
    """A run that warns (its tracker fails), and tells something when it is started again."""
    config = configuration(folder, limit={"steps": 2})
    config["reporting"]["trackers"] = [{"target": "tiny_trackers:Failing", "args": {"method": "log"}}]
    return config


WARNING = "Failing stopped working (OSError: no server); continuing without it"
TOLD = "This run is finished"  # to a run that is started again


def test_by_default_messages_are_printed_where_they_belong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(warning_run(tmp_path))
    first = capsys.readouterr()
    assert f"\nwarning: {WARNING}\n" in first.out
    train(warning_run(tmp_path))
    second = capsys.readouterr()
    assert second.out.count(f"\n{TOLD}") == 1
    assert first.err == second.err == ""
    assert (LOGGER.handlers, LOGGER.level, LOGGER.propagate) == ([], logging.NOTSET, True), "all is as it was"


@pytest.mark.parametrize("above", [False, True], ids=["own logger", "root logger"])
def test_a_caller_with_a_handler_gets_the_messages_and_they_are_not_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], above: bool
) -> None:
    kept, logger = Kept(), logging.getLogger() if above else LOGGER
    logger.addHandler(kept)
    logger.setLevel(logging.INFO)
    train(warning_run(tmp_path))
    train(warning_run(tmp_path))
    records = [record for record in kept.records if record[0].startswith("lockstep")]
    assert records[0] == ("lockstep.run", "WARNING", WARNING)
    assert records[1][:2] == ("lockstep.run", "INFO")
    assert records[1][2].startswith(TOLD)
    printed = capsys.readouterr()
    assert WARNING not in printed.out + printed.err
    assert TOLD not in printed.out + printed.err
    assert "epoch 1  step 2  loss" in printed.out, "figures are no messages"


def test_a_caller_silences_messages_by_a_handler_that_does_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    LOGGER.addHandler(logging.NullHandler())
    train(warning_run(tmp_path))
    printed = capsys.readouterr()
    assert WARNING not in printed.out + printed.err
    assert WARNING in (tmp_path / "metrics.jsonl").read_text(), "the record of the run has them all the same"


def test_a_level_that_the_caller_has_set_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    LOGGER.setLevel(logging.WARNING)
    train(warning_run(tmp_path))
    train(warning_run(tmp_path))
    printed = capsys.readouterr().out
    assert f"warning: {WARNING}" in printed
    assert TOLD not in printed


def test_the_command_line_prints_whatever_is_configured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Kept()
    logging.getLogger().addHandler(kept)
    with shown_messages(always=True):
        logging.getLogger("lockstep.launch").info("a message")
    assert capsys.readouterr().err == "lockstep: a message\n"
    assert main(["schema"]) == 0
    assert not kept.records


def test_a_launched_process_prints_from_its_start_and_nothing_twice(capsys: pytest.CaptureFixture[str]) -> None:
    logging.getLogger().addHandler(logging.StreamHandler())  # as a user's module may do when it is imported
    show_messages()
    with shown_messages():
        logging.getLogger("lockstep.run").warning("once, at 100 %")
        logging.getLogger("lockstep.checkpoints").info("and once")
    assert [type(handler) for handler in LOGGER.handlers] == [MessageHandler]
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("warning: once, at 100 %\n", "lockstep: and once\n")


def test_a_progress_bar_prints_the_messages_of_its_run_itself(capsys: pytest.CaptureFixture[str]) -> None:
    above: list[str] = []
    with shown_messages(always=True):
        print_run_messages_by(above.append)
        logging.getLogger("lockstep.run").warning("first")
        print_run_messages_by(None)
        logging.getLogger("lockstep.run").info("second")
    assert (above, capsys.readouterr().out) == (["warning: first"], "second\n")
