"""What a user's data sets, transforms, collate functions and samplers may do without being asked: each is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from runtime.errors import LockstepError
from tests.observed import assert_bitwise_equal, configuration, observe
from tests.process_pool import ProcessPool
from tests.test_resumption import observe_stopping
from tests.test_stream_runs import failure

single = pytest.mark.single


def run(folder: Path, train: Any = "Plain", num_workers: int = 0, **data: Any) -> dict[str, Any]:
    """A short run; ``train`` is a name in the user's module, or a section."""
    source = {"target": f"tiny_untrusted:{train}"} if isinstance(train, str) else train
    return configuration(
        folder, data={"train": source, "loader": {"num_workers": num_workers}, **data}, limit={"steps": 2}
    )


def source(target: str, **more: Any) -> dict[str, Any]:
    return {"target": f"tiny_untrusted:{target}", **more}


OFFENDERS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "a NumPy generator": (source("Plain", args={"draws": "numpy"}), {}, "Plain (the data set)"),
    "a torch generator": (source("Plain", args={"draws": "torch"}), {}, "Plain (the data set)"),
    "the system": (source("Plain", args={"draws": "system"}), {}, "Plain (the data set)"),
    "a generator of a deterministic one": (
        source("Deterministic", args={"draws": "numpy"}),
        {},
        "Deterministic (the data set)",
    ),
    "a global generator of a deterministic one": (source("DrawsThough"), {}, "DrawsThough (the data set)"),
    "seeds that are not heeded": (source("Seeded", args={"heeds": False}), {}, "Seeded (the data set)"),
    "a transform": (source("Plain", transform="tiny_untrusted:Jitter"), {}, "Jitter (the transform)"),
    "a collate function": (source("Plain"), {"collate": "tiny_untrusted:NoisyCollate"}, "NoisyCollate (the collate"),
    "a part that is left": (
        source("Plain", args={"draws": "numpy"}),
        {"split": {"validation": 0.2}},
        "data.validation: Plain (the data set)",
    ),
}
MENDED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a generator seeded for each sample": (source("Plain"), {}),
    "nothing drawn": (source("Plain", args={"draws": "none"}), {}),
    "seeds that are heeded": (source("Seeded"), {}),
    "a transform": (
        source("Plain", transform={"target": "tiny_untrusted:Jitter", "args": {"own": False}}),
        {},
    ),
    "a collate function": (
        source("Plain"),
        {"collate": {"target": "tiny_untrusted:NoisyCollate", "args": {"own": False}}},
    ),
    "a collate function of a deterministic one": (
        source("Deterministic", args={"draws": "none"}),
        {"collate": {"target": "tiny_untrusted:NoisyCollate", "args": {"own": False}}},
    ),
}


@single
@pytest.mark.parametrize("offender", OFFENDERS)
def test_what_gives_another_sample_when_read_again_is_named_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], offender: str
) -> None:
    train, data, named = OFFENDERS[offender]
    observe(run(tmp_path, train, **data))
    lines = capsys.readouterr().out.splitlines()
    told = [line for line in lines if "read again under its seed" in line]
    assert any(named in line for line in told), told
    assert not any("depends on the others of its microbatch" in line for line in lines)  # the loss is not to blame
    assert len(told) == (2 if "split" in data else 1)


@single
@pytest.mark.parametrize("mended", MENDED)
def test_what_draws_from_the_seeds_that_it_is_given_is_silent_and_the_same_on_workers(
    pool: ProcessPool, tmp_path: Path, capsys: pytest.CaptureFixture[str], mended: str
) -> None:
    train, data = MENDED[mended]
    here = observe(run(tmp_path / "here", train, **data))
    assert "read again" not in capsys.readouterr().out
    if "collate" in mended:
        assert_bitwise_equal(here, pool.run(observe, 1, run(tmp_path / "workers", train, 2, **data))[0])


@single
@pytest.mark.parametrize(
    ("train", "told"),
    [
        (
            {"target": "tiny:points", "transform": "tiny_untrusted:InPlace"},
            "InPlace (the transform) modifies samples held by the data",
        ),
        (
            source("Dictionaries", transform="tiny_untrusted:ScaledInPlace"),
            "ScaledInPlace (the transform) modifies samples",
        ),
        (source("OneBuffer"), "OneBuffer (the data set) reuses one buffer for all samples"),
        (source("Dictionaries", args={"fresh": True}, transform="tiny_untrusted:ScaledInPlace"), ""),
        (source("Dictionaries", args={"fresh": True}, transform="tiny_untrusted:Replaced"), ""),
        (source("Plain", args={"draws": "none"}, transform="tiny_untrusted:InPlace"), ""),
        ({"target": "tiny:points", "transform": "tiny_untrusted:identity"}, ""),
    ],
)
def test_samples_that_are_overwritten_are_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], train: dict[str, Any], told: str
) -> None:
    observe(run(tmp_path, train))
    lines = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert len(lines) == bool(told), lines
    assert told in "".join(lines)


@single
def test_looking_at_samples_changes_nothing(tmp_path: Path) -> None:
    train = source("Plain", transform="tiny_untrusted:InPlace", args={"draws": "none"})
    looked, not_looked = run(tmp_path / "on", train), {**run(tmp_path / "off", train), "checks": "off"}
    assert_bitwise_equal(observe(looked), observe(not_looked))


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"sampler": "torch.utils.data:DistributedSampler"}, ["data.sampler", "DistributedSampler", "48 of 96"]),
        ({"sampler": "tiny_untrusted:ByRank"}, ["data.sampler", "ByRank draws different samples on each rank"]),
        ({"sampler": "tiny_untrusted:FromSystem"}, ["data.sampler", "FromSystem", "drawn again"]),
        (
            {"weights": {"values": "tiny_untrusted:weights_of_rank"}},
            ["the list of values that determine the order", "rank 1"],
        ),
        (
            {"group_by_length": {"lengths": "tiny_untrusted:weights_of_rank"}},
            ["the list of values that determine the order", "rank 1"],
        ),
        ({"balance": {"classes": "tiny_untrusted:weights_of_rank"}}, []),  # other names for the same classes
        ({"sampler": "tiny_untrusted:LaterByRank"}, ["have drawn different samples"]),
    ],
)
def test_samples_that_ranks_draw_differently_are_refused_on_all_of_them(
    pool: ProcessPool, tmp_path: Path, section: dict[str, Any], words: list[str]
) -> None:
    sections: dict[str, Any] = {k: {"target": v} if isinstance(v, str) else as_target(v) for k, v in section.items()}
    config = {**run(tmp_path, **sections)}
    config["limit"] = {"epochs": 2}
    for reply in pool.run(failure, 2, config):
        for word in words or ["trained"]:
            assert word in reply


def as_target(section: dict[str, str]) -> dict[str, Any]:
    return {key: {"target": value} for key, value in section.items()}


@single
@pytest.mark.parametrize(
    ("section", "words"),
    [
        (
            {"sampler": {"target": "torch.utils.data:DistributedSampler", "args": {"num_replicas": 2, "rank": 0}}},
            ["data.sampler", "DistributedSampler", "48 of 96", "num_replicas: 1"],
        ),
        (
            {"batch_sampler": source("OwnBatches", args={"kind": "shares"})},
            ["data.batch_sampler", "DistributedSampler"],
        ),
        ({"batch_sampler": source("OwnBatches", args={"kind": "own"})}, ["data.batch_sampler", "drawn again"]),
        ({"sampler": source("Counting")}, ["data.sampler", "Counting", "no counter in the sampler"]),
        ({"sampler": {"target": "RandomSampler"}}, ["trained"]),
        ({"sampler": source("DrawsNothing")}, ["data.train", "DrawsNothing draws no samples"]),
        ({"sampler": {"target": "SubsetRandomSampler", "args": {"indices": list(range(5, 53))}}}, ["trained"]),
        (
            {"sampler": {"target": "torch.utils.data:DistributedSampler", "args": {"num_replicas": 1, "rank": 0}}},
            ["trained"],
        ),
    ],
)
def test_a_sampler_that_knows_of_ranks_or_does_not_repeat_is_refused(
    tmp_path: Path, section: dict[str, Any], words: list[str]
) -> None:
    message = failure(run(tmp_path, **section))
    for word in words:
        assert word in message


@pytest.mark.parametrize("part", ["train", "validation"])
def test_ranks_that_hold_the_same_files_in_another_order_are_refused(
    pool: ProcessPool, tmp_path: Path, part: str
) -> None:
    numbers = [str(n) for n in range(40)]
    (tmp_path / "train.txt").write_text(" ".join(numbers))
    (tmp_path / f"{part}-1.txt").write_text(" ".join(reversed(numbers)))
    train = source("Listed", args={"folder": str(tmp_path)})
    validation: dict[str, Any] = {"validation": source("Listed", args={"folder": str(tmp_path), "split": "validation"})}
    for reply in pool.run(failure, 2, run(tmp_path / "run", train, **validation)):
        assert f"sample 0 of data.{part}" in reply and "rank 1" in reply and "sort" in reply


@single
@pytest.mark.parametrize("part", ["train", "validation"])
def test_data_of_the_same_length_and_other_content_does_not_resume(tmp_path: Path, part: str) -> None:
    for name in ("train", "validation-0"):
        (tmp_path / f"{name}.txt").write_text(" ".join(str(n / 40) for n in range(40)))
    train = source("Listed", args={"folder": str(tmp_path)})
    validation: dict[str, Any] = {"validation": source("Listed", args={"folder": str(tmp_path), "split": "validation"})}
    config = run(tmp_path / "run", train, **validation)
    observe_stopping(config, 1)
    (tmp_path / ("train.txt" if part == "train" else "validation-0.txt")).write_text(" ".join("1" * 40))
    with pytest.raises(LockstepError, match=rf"data\.{part}: sample 0 and sample 20 .*changed since the first start"):
        observe(config)
    assert observe({**config, "resume": {"allow_changes": [f"data.{part}"]}})["step"] == 2


@single
def test_a_sampler_that_draws_otherwise_after_a_restart_does_not_resume(tmp_path: Path) -> None:
    (tmp_path / "order").write_text("1")
    config = run(tmp_path / "run", sampler=source("OrderOfFile", args={"path": str(tmp_path / "order")}))
    observe_stopping(config, 1)
    (tmp_path / "order").write_text("2")
    message = failure(config)
    assert "data.sampler: the sequence drawn for the first epoch changed since the first start" in message
    assert observe({**config, "resume": {"allow_changes": ["data.sampler"]}})["step"] == 2


@single
def test_sampling_weights_that_changed_do_not_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCKSTEP_TEST_WEIGHTS", str(tmp_path / "weights"))
    (tmp_path / "weights").write_text("1")
    config = run(tmp_path / "run", weights={"values": {"target": "tiny_untrusted:weights_of_file"}})
    observe_stopping(config, 1)
    (tmp_path / "weights").write_text("2")
    assert "the list of values that determine the order" in failure(config)


@single
@pytest.mark.parametrize("collate", ["dropping", "two_views"])
@pytest.mark.parametrize(
    ("objective", "told"),
    [
        ("tiny_untrusted:CountsSamples", "warned"),
        ("FocalLoss", "silent"),  # counts its targets
        ("MultiMarginLoss", "refused"),
        ("tiny_untrusted:CountsRows", "silent"),
        ("CrossEntropyLoss", "silent"),  # counts its targets
    ],
)
def test_batches_whose_rows_are_not_their_samples_are_told_where_samples_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], collate: str, objective: str, told: str
) -> None:
    config = {**run(tmp_path, collate=f"tiny_untrusted:{collate}"), "objective": objective}
    config["model"] = {"target": "tiny:Mlp", "args": {"batch_norm": False}}
    config["batch"] = {"global_size": 24, "slots": 4}
    message = failure(config)
    lines = [line for line in capsys.readouterr().out.splitlines() if "a batch of 6 samples has" in line]
    assert len(lines) == (told == "warned")
    assert ("a batch of 6 samples has" in message) == (told == "refused")


@single
@pytest.mark.parametrize(("collate", "objective"), [("time_first", "TimeFirst"), ("plain", "CountsSamples")])
def test_a_row_for_each_sample_in_any_layout_is_silent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], collate: str, objective: str
) -> None:
    config = run(tmp_path, collate=f"tiny_untrusted:{collate}")
    assert failure({**config, "objective": {"target": f"tiny_untrusted:{objective}"}}) == "trained"
    assert "samples has" not in capsys.readouterr().out
