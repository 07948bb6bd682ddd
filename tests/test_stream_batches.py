"""Streams that yield whole batches of ragged sizes: one process that holds all rows of a step is the truth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from runtime.commands.dry_run import show
from runtime.config.file import load
from runtime.data.fields import Fields
from runtime.data.yielded_batches import rows_from, rows_of
from runtime.errors import ConfigurationError, DataError, LockstepError
from runtime.session import evaluate
from tests.observed import assert_bitwise_equal, configuration, largest_difference, observe
from tests.process_pool import ProcessPool
from tests.project.batch_streams import SIZES, VALIDATION, Fixed, FixedBag, packed, ragged
from tests.test_resumption import observe_stopping

single = pytest.mark.single
SIZE, EPOCHS = 4, 2  # eleven batches an epoch: two steps of four and one of three
STEPS = EPOCHS * 3


def source(
    name: str = "Ragged", sharded_by: str = "runtime", transform: str | None = None, **args: Any
) -> dict[str, Any]:
    made = {"target": f"batch_streams:{name}", "args": args, "sharded_by": sharded_by, "yields": "batches"}
    return made | ({"transform": transform} if transform else {})


def run(folder: Path, train: dict[str, Any] | None = None, *, num_workers: int = 0, **changes: Any) -> dict[str, Any]:
    data = {"train": train or source(), "loader": {"num_workers": num_workers}, **changes.pop("data", {})}
    sections = {"model": "batch_streams:Fixed", "batch": {"global_size": SIZE}, "limit": {"epochs": EPOCHS}}
    sections |= {"checks": "off"}  # which cost as much as these few steps
    return configuration(folder, **{**sections, **changes, "data": data})


class Truth:
    """SGD with momentum on the mean over all rows of four batches at a time."""

    def __init__(self, model: torch.nn.Module, form: Any = lambda inputs, target: (inputs,)) -> None:
        self.model, self.form = model, form
        self.losses: dict[int, float] = {}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for epoch in range(EPOCHS):
            batches = ragged(SIZES, epoch)
            for start in range(0, len(batches), SIZE):
                total, rows = self.loss_and_rows(batches[start : start + SIZE])
                optimizer.zero_grad()
                (total / rows).backward()
                optimizer.step()
                self.losses[len(self.losses) + 1] = float(total.detach()) / rows

    def loss_and_rows(self, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, int]:
        losses = [F.cross_entropy(self.model(*self.form(x, y)), y, reduction="sum") for x, y in batches]
        return torch.stack(losses).sum(), sum(len(y) for _, y in batches)

    def assert_is(self, found: dict[str, Any]) -> None:
        assert found["step"] == STEPS
        assert found["losses"] == pytest.approx(self.losses, rel=1e-12)
        for name, expected in self.model.state_dict().items():
            np.testing.assert_allclose(found["weights"][name], expected.numpy(), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(
    ("world_size", "num_workers"),
    [pytest.param(1, 0, marks=single), pytest.param(1, 2, marks=single), (2, 0), (3, 2)],
)
def test_losses_weights_and_evaluation_are_those_of_one_process_with_all_rows(
    pool: ProcessPool, tmp_path: Path, world_size: int, num_workers: int
) -> None:
    truth = Truth(Fixed())
    data = {"validation": source(split="validation"), "test": source(split="validation")}
    metrics = {"accuracy": {"target": "Accuracy", "args": {"task": "multiclass", "num_classes": 3, "average": "micro"}}}
    changes: dict[str, Any] = {
        "objective": "batch_objectives:Sum",
        "evaluation": {"every": "1 epoch", "metrics": metrics},
    }
    config = run(tmp_path, num_workers=num_workers, data=data, **changes)
    validation = ragged(VALIDATION, 0)
    with torch.no_grad():
        total, rows = truth.loss_and_rows(validation)
        right = sum(int((truth.model(inputs).argmax(-1) == target).sum()) for inputs, target in validation)
    for reply in pool.run(observe, world_size, config):
        truth.assert_is(reply)
        assert reply["results"]["samples"] == rows == sum(VALIDATION)
        assert reply["results"]["loss"] == pytest.approx(float(total) / rows, rel=1e-12)
        assert reply["results"]["accuracy"] == pytest.approx(right / rows, rel=1e-6)


@pytest.mark.parametrize(
    ("world_size", "name", "args", "changes"),
    [
        pytest.param(1, "Ragged", {"form": "arrays"}, {}, marks=single),
        (
            2,
            "Packed",
            {},
            {
                "model": "batch_streams:FixedBag",
                "data": {"fields": {"inputs": {"words": "words", "starts": "starts"}, "target": "target"}},
            },
        ),
    ],
)
def test_batches_in_other_forms_are_trained_on_alike(
    pool: ProcessPool, tmp_path: Path, world_size: int, name: str, args: dict[str, Any], changes: dict[str, Any]
) -> None:
    def words(inputs: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = packed(inputs, target)
        return found["words"], found["starts"]

    truth = Truth(FixedBag(), words) if name == "Packed" else Truth(Fixed())
    for reply in pool.run(observe, world_size, run(tmp_path, source(name, **args), **changes)):
        truth.assert_is(reply)


@pytest.mark.parametrize(
    ("world_size", "name", "num_workers"),
    [pytest.param(1, "Ragged", 2, marks=single), pytest.param(1, "Stateful", 0, marks=single), (2, "Stateful", 2)],
)
def test_a_run_killed_within_epochs_goes_on_bit_for_bit(
    pool: ProcessPool, tmp_path: Path, world_size: int, name: str, num_workers: int
) -> None:
    dropout: dict[str, Any] = {"model": {"target": "batch_streams:Fixed", "args": {"dropout": 0.2}}}
    train = source(name, transform="batch_streams:noisy")
    whole = pool.run(observe, world_size, run(tmp_path / "whole", train, num_workers=num_workers, **dropout))
    config = run(tmp_path / "stopped", train, num_workers=num_workers, **dropout)
    for after in (1, 5, None):
        stopped = pool.run(observe_stopping, world_size, config, after)
    assert stopped[0]["step"] == STEPS
    for expected, got in zip(whole, stopped, strict=True):
        assert_bitwise_equal(expected, got)


def test_dropout_and_transforms_do_not_depend_on_ranks_or_workers_also_where_they_change_between_starts(
    pool: ProcessPool, tmp_path: Path
) -> None:
    dropout: dict[str, Any] = {"model": {"target": "batch_streams:Fixed", "args": {"dropout": 0.2}}}
    train = source(transform="batch_streams:noisy")
    whole = pool.run(observe, 1, run(tmp_path / "one", train, **dropout))[0]
    pool.run(observe_stopping, 3, run(tmp_path / "several", train, **dropout), 2)
    pool.run(observe_stopping, 1, run(tmp_path / "several", train, num_workers=2, **dropout), 4)
    resumed = pool.run(observe, 2, run(tmp_path / "several", train, num_workers=1, **dropout))[0]
    assert resumed["step"] == STEPS
    assert largest_difference(whole, resumed) < 1e-12


def test_a_stream_that_shares_its_batches_out_trains_on_every_row(pool: ProcessPool, tmp_path: Path) -> None:
    config = run(tmp_path, source("Shares", sharded_by="dataset"), num_workers=1, limit={"epochs": 1})
    found = pool.run(observe, 2, config)[0]
    first, second = ragged(SIZES, 0)[::2], ragged(SIZES, 0)[1::2]
    expected = Fixed()
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9)
    for step in range(3):  # two batches of each rank
        batches = first[2 * step : 2 * step + 2] + second[2 * step : 2 * step + 2]
        optimizer.zero_grad()
        total = torch.stack([F.cross_entropy(expected(x), y, reduction="sum") for x, y in batches]).sum()
        (total / sum(len(y) for _, y in batches)).backward()
        optimizer.step()
    for name, value in expected.state_dict().items():
        np.testing.assert_allclose(found["weights"][name], value.numpy(), rtol=1e-11, atol=1e-13)


def test_training_on_samples_and_evaluating_batches_and_the_reverse(pool: ProcessPool, tmp_path: Path) -> None:
    points = {"target": "tiny:points", "args": {"size": 41}}
    config = run(tmp_path / "a", points, batch={"global_size": 16}, data={"validation": source(split="validation")})
    assert pool.run(observe, 2, config)[0]["results"]["samples"] == sum(VALIDATION)
    config = run(tmp_path / "b", data={"validation": points}, evaluation={"micro_size": 7})
    assert pool.run(observe, 2, config)[0]["results"]["samples"] == 41


def evaluated(config: dict[str, Any], split: str) -> dict[str, Any]:
    return dict(evaluate(config, split=split).results)


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=single), 2])
def test_a_checkpoint_is_evaluated_on_every_row_of_streams(pool: ProcessPool, tmp_path: Path, world_size: int) -> None:
    data = {
        "validation": {"target": "tiny_streams:Points", "args": {"size": 41}, "sharded_by": "runtime"},
        "test": source(split="validation"),
        "drop_last": True,  # is for training alone
    }
    config = run(tmp_path, data=data, evaluation={"micro_size": 7}, limit={"epochs": 1})
    trained = observe(config)
    model = Fixed()
    model.load_state_dict({name: torch.from_numpy(value) for name, value in trained["weights"].items()})
    with torch.no_grad():
        losses = [F.cross_entropy(model(inputs), target, reduction="sum") for inputs, target in ragged(SIZES, 0)]
    of_training = pool.run(evaluated, world_size, config, "train")[0]
    assert of_training["samples"] == sum(SIZES)
    assert of_training["loss"] == pytest.approx(float(sum(losses)) / sum(SIZES), rel=1e-12)
    of_test = pool.run(evaluated, world_size, config, "test")[0]
    assert of_test["samples"] == sum(VALIDATION)
    assert pool.run(evaluated, world_size, config, "validation")[0]["samples"] == 41


@single
def test_what_is_reported_counts_rows_and_show_says_what_a_slot_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = run(tmp_path, limit={"epochs": 1})
    observe(config)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    start = next(record for record in records if record["event"] == "start")
    assert start["batch"] == "4 yielded batches in 4 slots of at most 1"
    assert start["data"] == "a stream of training batches"
    capsys.readouterr()
    show(load(config), 2)
    told = " ".join(capsys.readouterr().out.split())
    assert "K = 4 (batch.slots), 1 yielded batch each" in told
    assert "a batch (5, 8) float64, (5,) int64 (as the stream yields it)" in told


@single
def test_an_objective_that_returns_a_mean_is_found_by_the_rows_of_one_batch(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="returns a mean, not a sum"):
        observe(run(tmp_path, objective="batch_objectives:Mean", limit={"steps": 1}, checks="on"))


@single
@pytest.mark.parametrize("objective", ["Sum", "Coupled"])
def test_samples_of_one_yielded_batch_may_depend_on_each_other(
    tmp_path: Path, objective: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = run(tmp_path, objective=f"batch_objectives:{objective}", limit={"steps": 1}, checks="on")
    assert observe(config)["step"] == 1
    assert "depend" not in "".join(capsys.readouterr())


@single
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch": {"global_size": 4, "micro_size": 2}}, ["batch.micro_size", "must be 1 or left out"]),
        ({"batch": {"global_size": 4, "micro_size": "auto"}}, ["batch.micro_size", "must be 1 or left out"]),
        ({"batch": {"global_size": 4, "slots": 8}}, ["batch.slots", "must be global_size (4) or left out"]),
        ({"batch": {"global_size": 4, "slots": 2}}, ["batch.slots", "must be global_size (4) or left out"]),
        ({"data": {"collate": "Padded"}}, ["data.collate", "yields: batches"]),
        ({"data": {"validation": {"target": "tiny:points"}}}, ["evaluation.micro_size", "is required here"]),
        (
            {"data": {"validation": source()}, "evaluation": {"micro_size": 3}},
            ["evaluation.micro_size", "leave it out"],
        ),
        ({"train": {"target": "tiny:points", "yields": "batches"}}, ["data.train.yields", "batches is for streams"]),
        (
            {"train": {"target": "tiny:points", "yields": "batches", "sharded_by": "runtime"}},
            ["data.train.sharded_by", "no stream", "'yields'"],
        ),
        ({"train": source() | {"yields": "lists"}}, ["data.train.yields", "samples"]),
        ({"train": source("Unequal", kind="shapes")}, ["batch 1 of epoch 1", "cannot be determined", "(3, 8), (4,)"]),
        ({"train": source("Unequal", kind="texts")}, ["batch 1 of epoch 1", "without tensors"]),
        ({"train": source("Unequal", kind="empty")}, ["batch 2 of epoch 1", "no samples"]),
        ({"train": {k: v for k, v in source().items() if k != "yields"}}, ["collate", "yields: batches"]),
    ],
)
def test_what_cannot_go_with_whole_batches_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(LockstepError) as caught:
        observe(run(tmp_path, changes.pop("train", None), **changes))
    assert not [word for word in words if word not in str(caught.value)], str(caught.value)


def test_fewer_batches_a_step_than_processes_are_refused(pool: ProcessPool, tmp_path: Path) -> None:
    def words(reply: str) -> bool:
        return "batch.global_size" in reply and "1 yielded batches cannot keep 2 processes busy" in reply

    assert all(words(reply) for reply in pool.run(refusal, 2, run(tmp_path, batch={"global_size": 1})))


def refusal(config: dict[str, Any]) -> str:
    try:
        observe(config)
    except LockstepError as error:
        return str(error)
    return "trained"


class Own:
    """A batch of a class of its own."""

    def __len__(self) -> int:
        return 6


@pytest.mark.parametrize(
    ("batch", "fields", "expected"),
    [
        (torch.zeros(3, 2), {}, 3),
        ({"a": torch.zeros(3, 2), "b": [torch.zeros(3)], "c": torch.tensor(1.0), "d": "text"}, {}, 3),
        ([torch.zeros(7, 3, 8), torch.zeros(3)], {}, 3),  # time first
        ({"words": torch.zeros(9), "labels": torch.zeros(2)}, {"inputs": "words", "target": "labels"}, 2),
        ({"x": torch.zeros(4, 2), "edges": torch.zeros(2, 9)}, {"inputs": "x"}, 4),
        ({"x": torch.zeros(4, 2), "y": torch.zeros(4), "edges": torch.zeros(2, 9)}, {"target": ["x", "y"]}, 4),
        (Own(), {}, 6),
        ((Own(), torch.zeros(5)), {}, 5),
    ],
)
def test_samples_of_a_batch_are_the_rows_of_its_tensors_and_else_of_the_target(
    batch: Any, fields: dict[str, Any], expected: int
) -> None:
    assert rows_of(batch, Fields(**fields)) == expected


@pytest.mark.parametrize("batch", [{"a": torch.zeros(3), "b": torch.zeros(4)}, torch.tensor(1.0), "text", [], 3, None])
def test_a_batch_whose_samples_cannot_be_counted_is_refused(batch: Any) -> None:
    with pytest.raises(DataError, match="cannot be determined"):
        rows_of(batch, Fields())


def test_rows_are_taken_only_from_batches_that_have_them_in_every_part() -> None:
    batch = {"a": torch.arange(4), "b": ["w", "x", "y", "z"], "c": (torch.ones(4, 2),)}
    found = rows_from(batch, 1, 3, rows=4)
    assert (found["a"].tolist(), found["b"], found["c"][0].shape) == ([1, 2], ["x", "y"], (2, 2))
    assert rows_from(batch | {"d": torch.ones(2, 9)}, 1, 3, rows=4) is None
    assert rows_from(batch | {"d": 3}, 1, 3, rows=4) is None
