"""Whole runs on streams: equal on any number of ranks and workers, resumed bit for bit, refused where they cannot be exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from runtime.errors import LockstepError
from tests.observed import assert_bitwise_equal, configuration, largest_difference, observe
from tests.process_pool import ProcessPool
from tests.test_resumption import observe_stopping

single = pytest.mark.single
POINTS = {"target": "tiny_streams:Points", "sharded_by": "runtime", "transform": "tiny_streams:jitter"}


def run(folder: Path, num_workers: int = 0, source: Any = POINTS, **changes: Any) -> dict[str, Any]:
    return configuration(
        folder,
        **{
            "data": {"train": source, "loader": {"num_workers": num_workers}},
            "batch": {"global_size": 16, "slots": 4},
            "limit": {"epochs": 2},
            **changes,
        },
    )


def failure(config: dict[str, Any]) -> str:
    try:
        observe(config)
    except LockstepError as error:
        return str(error)
    return "trained"


@pytest.mark.parametrize(("world_size", "num_workers"), [(2, 0), (3, 1)])
def test_dropout_batch_norm_and_transforms_give_the_same_weights_on_any_number_of_ranks_and_workers(
    pool: ProcessPool, tmp_path: Path, world_size: int, num_workers: int
) -> None:
    one = observe(run(tmp_path / "one"))
    several = pool.run(observe, world_size, run(tmp_path / "several", num_workers))
    assert one["step"] == several[0]["step"] == 12  # 90 samples: five batches of 16 and one of 10, twice
    assert several[0]["losses"] == pytest.approx(one["losses"], rel=1e-10)
    for reply in several:
        assert largest_difference(one, reply) < 1e-10
        assert_bitwise_equal(reply, several[0])


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=single), 2])
@pytest.mark.parametrize("source", [POINTS, {"target": "tiny_streams:StatefulPoints", "sharded_by": "runtime"}])
def test_a_resumed_run_is_bitwise_equal(
    pool: ProcessPool, tmp_path: Path, world_size: int, source: dict[str, Any]
) -> None:
    whole = pool.run(observe, world_size, run(tmp_path / "whole", source=source))
    config = run(tmp_path / "stopped", source=source)
    for after in (4, 6, 9, None):  # within an epoch, on its edge, in the second
        stopped = pool.run(observe_stopping, world_size, config, after)
    assert stopped[0]["step"] == 12
    for expected, got in zip(whole, stopped, strict=True):
        assert_bitwise_equal(expected, got)


def test_one_run_on_two_one_and_three_processes_ends_with_the_same_weights(pool: ProcessPool, tmp_path: Path) -> None:
    whole = observe(run(tmp_path / "whole"))
    config = run(tmp_path / "stopped")
    pool.run(observe_stopping, 2, config, 3)
    observe_stopping(config, 7)
    assert largest_difference(whole, pool.run(observe, 3, config)[0]) < 1e-10


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=single), 2])
def test_weights_are_those_of_the_whole_batch_where_targets_are_masked(
    pool: ProcessPool, tmp_path: Path, world_size: int
) -> None:
    changes: dict[str, Any] = {
        "model": {"target": "tiny:Tagger"},
        "objective": {"target": "NextTokenLoss"},
        "limit": {"epochs": 1},
    }
    mapped = run(tmp_path / "mapped", source={"target": "tiny:tokens"}, **changes)
    mapped["data"]["shuffle"] = False
    streamed = run(tmp_path / "streamed", source={"target": "tiny_streams:Tokens", "sharded_by": "runtime"}, **changes)
    expected, got = observe(mapped), pool.run(observe, world_size, streamed)[0]
    assert got["losses"] == pytest.approx(expected["losses"], rel=1e-10)
    assert largest_difference(expected, got) < 1e-10


def test_a_stream_that_shares_itself_out_trains_on_all_of_it_and_resumes_bitwise(
    pool: ProcessPool, tmp_path: Path
) -> None:
    source = {"target": "tiny_streams:SharedPoints", "sharded_by": "dataset"}
    model = {"target": "tiny:Mlp", "args": {"batch_norm": False}}  # the last slots may have one sample
    whole = pool.run(observe, 2, run(tmp_path / "whole", 2, source, model=model))
    config = run(tmp_path / "stopped", 2, source, model=model)
    pool.run(observe_stopping, 2, config, 3)
    resumed = pool.run(observe, 2, config)
    for expected, got in zip(whole, resumed, strict=True):
        assert_bitwise_equal(expected, got)
    assert "ranks" in failure(config)  # on one process


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=single), 2, 3])
def test_evaluation_of_a_stream_is_that_of_its_samples(pool: ProcessPool, tmp_path: Path, world_size: int) -> None:
    arguments = {"split": "validation", "size": 41}
    changes: dict[str, Any] = {"limit": {"steps": 2}, "evaluation": {"micro_size": 4}}
    mapped = run(tmp_path / "mapped", **changes)
    mapped["data"]["validation"] = {"target": "tiny:points", "args": arguments}
    streamed = run(tmp_path / "streamed", **changes)
    streamed["data"]["validation"] = {"target": "tiny_streams:Points", "args": arguments, "sharded_by": "runtime"}
    expected, got = pool.run(observe, world_size, mapped)[0], pool.run(observe, world_size, streamed)[0]
    assert got["results"]["samples"] == 41
    assert got["results"]["loss"] == pytest.approx(expected["results"]["loss"], rel=1e-12)


def test_a_stream_that_shares_itself_out_though_the_runtime_was_to_is_refused_on_all_ranks(
    pool: ProcessPool, tmp_path: Path
) -> None:
    source = {"target": "tiny_streams:Sliced", "sharded_by": "runtime"}
    for reply in pool.run(failure, 2, run(tmp_path, source={**source, "args": {"size": 91}})):
        assert "streams of different contents" in reply and "sharded_by: dataset" in reply


@single
@pytest.mark.parametrize(
    ("source", "changes", "words"),
    [
        ({"target": "tiny_streams:Points"}, {}, ["data.train", "sharded_by: runtime", "dataset"]),
        ({"target": "tiny:points", "sharded_by": "runtime"}, {}, ["data.train.sharded_by", "no stream"]),
        (
            {"target": "tiny_streams:Raising", "sharded_by": "runtime"},
            {},
            ["global batch 2 of epoch 1", "the shard is gone"],
        ),
        ({"target": "tiny_streams:Empty", "sharded_by": "runtime"}, {}, ["the stream is empty"]),
        (POINTS, {"schedule": {"target": "CosineAnnealingLR"}}, ["schedule.args", "T_max", "stream"]),
        (POINTS, {"shuffle": True}, ["data.shuffle", "own order"]),
    ],
)
def test_what_a_stream_cannot_do_is_said(
    tmp_path: Path, source: dict[str, Any], changes: dict[str, Any], words: list[str]
) -> None:
    config = run(tmp_path, source=source)
    config["data"] |= {key: value for key, value in changes.items() if key == "shuffle"}
    config |= {key: value for key, value in changes.items() if key != "shuffle"}
    message = failure(config)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"source": {"target": "tiny_streams:Empty", "sharded_by": "runtime"}}, "the stream is empty"),
        (
            {
                "source": {"target": "tiny_streams:SharedPoints", "sharded_by": "dataset"},
                "batch": {"global_size": 16, "slots": 1},
            },
            "a slot for each rank",
        ),
    ],
    ids=["empty", "fewer slots than ranks"],
)
def test_every_rank_is_told_what_several_ranks_cannot_train_on(
    pool: ProcessPool, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    for reply in pool.run(failure, 2, run(tmp_path, **changes)):
        assert words in reply
