"""What a user's stream may do without being asked: share itself out, forget what it held, draw for itself, change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from runtime.errors import LockstepError
from tests.observed import assert_bitwise_equal, largest_difference, observe
from tests.process_pool import ProcessPool
from tests.test_resumption import observe_stopping
from tests.test_stream_runs import failure, run

single = pytest.mark.single


def streamed(target: str, **args: Any) -> dict[str, Any]:
    return {"target": f"tiny_streams:{target}", "sharded_by": "runtime", "args": args}


@single
@pytest.mark.parametrize("target", ["SharesOverWorkers", "SeededByWorker"])
def test_a_stream_that_asks_which_worker_reads_it_is_trained_on_and_evaluated_whole(
    pool: ProcessPool, tmp_path: Path, target: str
) -> None:
    changes: dict[str, Any] = {"limit": {"epochs": 1}, "evaluation": {"micro_size": 4}}
    replies = []
    for workers in (0, 2):
        config = run(tmp_path / str(workers), workers, streamed(target), **changes)
        config["data"]["validation"] = streamed(target, size=41, split="validation")
        replies.append(pool.run(observe, 1, config)[0])
    here, with_workers = replies
    assert here["step"] == with_workers["step"] == 6  # 90 samples
    assert here["results"]["samples"] == with_workers["results"]["samples"] == 41
    assert here["results"] == pytest.approx(with_workers["results"], rel=1e-12)
    assert_bitwise_equal(here, with_workers)


@single
@pytest.mark.parametrize(
    "source", [{"target": "tiny:points"}, {"target": "tiny_streams:Points", "sharded_by": "runtime"}]
)
def test_a_transform_that_asks_which_worker_it_runs_in_gives_what_it_gives_without_workers(
    pool: ProcessPool, tmp_path: Path, source: dict[str, Any]
) -> None:
    source = {**source, "transform": "tiny_streams:times_worker"}
    configs = [run(tmp_path / str(workers), workers, source, limit={"steps": 4}) for workers in (0, 2)]
    assert_bitwise_equal(*[pool.run(observe, 1, config)[0] for config in configs])


def test_a_stream_that_shares_itself_out_evenly_over_ranks_is_refused(pool: ProcessPool, tmp_path: Path) -> None:
    for reply in pool.run(failure, 2, run(tmp_path / "train", source=streamed("Sliced", size=90))):
        assert "of different contents" in reply and "sharded_by: dataset" in reply
    config = run(tmp_path / "validation", limit={"steps": 2})
    config["data"]["validation"] = streamed("Sliced", size=40)
    for reply in pool.run(failure, 2, config):
        assert "evaluation streams of different contents" in reply


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=single), 2])
@pytest.mark.parametrize(
    ("target", "num_workers"),
    [("Shuffled", 0), ("Shuffled", 2), ("LiveState", 0), ("StateOfTensors", 0), ("StatefulPoints", 2)],
)
def test_a_run_on_a_stream_whose_state_is_not_all_of_it_goes_on_as_if_nothing_had_happened(
    pool: ProcessPool, tmp_path: Path, world_size: int, target: str, num_workers: int
) -> None:
    source = streamed(target)
    whole = pool.run(observe, world_size, run(tmp_path / "whole", num_workers, source))
    config = run(tmp_path / "stopped", num_workers, source)
    for after in (2, 4, 7, None):
        stopped = pool.run(observe_stopping, world_size, config, after)
    told = (tmp_path / "stopped" / "metrics.jsonl").read_text().count("the stream is read again from its beginning")
    assert told == (3 if target in ("Shuffled", "StateOfTensors") else 0)
    for expected, got in zip(whole, stopped, strict=True):
        assert_bitwise_equal(expected, got)


@single
def test_a_stream_that_does_not_repeat_itself_is_refused_on_resumption_and_read_where_the_user_insists(
    tmp_path: Path,
) -> None:
    config = run(tmp_path / "own", source=streamed("OwnGenerator"))
    observe_stopping(config, 3)
    message = failure(config)
    assert "OwnGenerator does not repeat itself" in message and "generator" in message and "allow_changes" in message
    assert observe({**config, "resume": {"allow_changes": ["data"]}})["step"] == 12


def test_streams_of_different_lengths_are_refused_on_all_ranks(pool: ProcessPool, tmp_path: Path) -> None:
    for reply in pool.run(failure, 2, run(tmp_path, source=streamed("ShorterOnSome"))):
        assert "of different lengths" in reply and "sharded_by: dataset" in reply


@single
@pytest.mark.parametrize("part", ["train", "validation"])
def test_loader_workers_that_read_different_streams_are_found(pool: ProcessPool, tmp_path: Path, part: str) -> None:
    config = run(tmp_path, 2, streamed("Unseeded" if part == "train" else "Points"), limit={"steps": 3})
    if part == "validation":
        config["data"]["validation"] = streamed("Unseeded", split="validation")
    (reply,) = pool.run(failure, 1, config)
    assert "loader workers of a rank read different" in reply and "generator" in reply


OFFENDERS = {
    "a generator of its own": (streamed("OwnGenerator"), {}, "data.train: OwnGenerator (the data set)"),
    "the system's entropy": (streamed("Unseeded"), {}, "data.train: Unseeded (the data set)"),
    "a count of epochs": (streamed("CountsEpochs"), {}, "data.train: CountsEpochs (the data set)"),
    "a transform": (streamed("Points") | {"transform": "tiny_untrusted:Jitter"}, {}, "Jitter (the transform)"),
    "a collate function": (streamed("Points"), {"collate": "tiny_untrusted:NoisyCollate"}, "NoisyCollate (the coll"),
    "an evaluation stream": (
        streamed("Points"),
        {"validation": streamed("OwnGenerator")},
        "data.validation: OwnGenerator (the data set)",
    ),
    "a stream that shares itself out": (
        streamed("Unseeded") | {"sharded_by": "dataset"},
        {},
        "data.train: Unseeded (the data set)",
    ),
    "a lost shuffle buffer": (streamed("Shuffled"), {}, "is incomplete"),
    "a state of tensors": (streamed("StateOfTensors"), {}, "cannot be stored as JSON"),
}
SILENT = {
    "global generators": (streamed("Points"), {}),
    "the epoch that it is told": (streamed("ToldEpochs"), {}),
    "a whole state": (streamed("StatefulPoints"), {}),
    "a generator that is part of the state": (streamed("KeepsGenerator"), {}),
    "a live state": (streamed("LiveState"), {}),
    "seeded transform and collate function": (
        streamed("Points") | {"transform": "tiny_streams:jitter"},
        {"collate": {"target": "tiny_untrusted:NoisyCollate", "args": {"own": False}}},
    ),
    "an iterator": (streamed("OwnIterator"), {}),
}


@single
@pytest.mark.parametrize("case", [*OFFENDERS, *SILENT])
def test_a_stream_that_does_not_repeat_itself_or_forgets_is_named_at_the_first_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    train, data, *named = OFFENDERS.get(case) or SILENT[case]
    config = run(tmp_path, source=train, limit={"steps": 1})
    config["data"] |= data
    observe(config)
    told = [line for line in capsys.readouterr().out.splitlines() if "warning: data." in line]
    assert [name for name in named if name in told[0]] == named if named else not told
    assert len(told) == len(named)


@single
def test_looking_at_a_stream_changes_nothing(tmp_path: Path) -> None:
    for number, target in enumerate(("Points", "StatefulPoints", "KeepsGenerator", "Shuffled")):
        looked = run(tmp_path / f"{number}-on", source=streamed(target))
        not_looked = {**run(tmp_path / f"{number}-off", source=streamed(target)), "checks": "off"}
        assert_bitwise_equal(observe(looked), observe(not_looked))


@single
@pytest.mark.parametrize("part", ["train", "validation"])
def test_a_stream_whose_beginning_changed_under_the_run_is_refused(tmp_path: Path, part: str) -> None:
    numbers = tmp_path / "numbers.txt"
    numbers.write_text("0\n" * 90)
    config = run(tmp_path / "run", source=streamed("Written" if part == "train" else "Points"), limit={"steps": 4})
    written = streamed("Written", path=str(numbers))
    config["data"] |= {"train": written} if part == "train" else {"validation": written}
    observe_stopping(config, 3)
    numbers.write_text("1\n" + "0\n" * 89)
    with pytest.raises(
        LockstepError, match=rf"data\.{part}: the beginning of the stream changed since the first start"
    ):
        observe(config)
    assert observe({**config, "resume": {"allow_changes": [f"data.{part}"]}})["step"] == 4


@single
def test_a_stream_whose_data_changed_under_the_run_is_refused(tmp_path: Path) -> None:
    numbers = tmp_path / "numbers.txt"
    numbers.write_text("0\n" * 90)
    config = run(tmp_path / "run", source=streamed("Written", path=str(numbers)))
    observe_stopping(config, 3)
    numbers.write_text("0\n" * 48 + "1\n" * 42)
    with pytest.raises(LockstepError, match="data changed"):
        observe(config)
    numbers.write_text("0\n" * 90)
    whole = observe(run(tmp_path / "whole", source=streamed("Written", path=str(numbers))))
    assert largest_difference(whole, observe(config)) == 0
