"""Averages of weights and their BatchNorm statistics, against loops written by hand with torch.optim.swa_utils."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, lr_scheduler, swa_utils

from runtime.checkpoints.load import load_state
from runtime.cli import main
from runtime.commands.weights_file import export
from runtime.config.learning import AveragingSection
from runtime.data.batches import slot_slice
from runtime.data.order import IndexOrder
from runtime.errors import CheckpointError
from runtime.optimization.averaging import WeightAverage
from runtime.randomness import Purpose, derive, preserved_random_state, seed_everything
from tests.observed import assert_bitwise_equal, configuration, observe
from tests.process_pool import ProcessPool
from tests.project import tiny
from tests.test_resumption import observe_leaving_an_evaluation, observe_stopping

EPOCHS, PER_EPOCH, SIZE, BATCH, SLOTS = 4, 4, 60, 16, 5
SWA = {"kind": "swa", "start": "2 epochs", "learning_rate": 0.05, "anneal": {"epochs": 3}}
WORLDS = pytest.mark.parametrize("world_size", [1, 2, 3])


def run(folder: Path, averaging: dict[str, Any] | None, **changes: Any) -> dict[str, Any]:
    """BatchNorm in float64; 60 samples in 4 batches, the last of 12; 5 slots, which 2 and 3 ranks share unevenly."""
    return configuration(
        folder,
        **{
            "model": {"target": "tiny:Mlp", "args": {"dropout": 0.0}},
            "data": {"train": {"target": "tiny:points", "args": {"size": SIZE}}, "validation": "tiny:points"},
            "batch": {"global_size": BATCH, "slots": SLOTS},
            "schedule": {"target": "StepLR", "args": {"step_size": 1, "gamma": 0.8}, "interval": "epoch"},
            "averaging": averaging,
            "limit": {"epochs": EPOCHS},
            "checkpoint": {"every": "1 epoch", "keep": 10},
            "evaluation": {"every": "1 epoch"},
            **changes,
        },
    )


def slots(epoch: int) -> Iterator[list[list[int]]]:
    order = IndexOrder(SIZE, batch_size=BATCH, seed=0, shuffle=True, drop_last=False)
    for number in range(order.num_batches(epoch)):
        ids = order.batch(epoch, number)
        yield [slot_slice(ids, SLOTS, slot).tolist() for slot in range(SLOTS)]


def initial() -> nn.Module:
    with preserved_random_state(torch.device("cpu")):
        seed_everything(derive(0, Purpose.INITIALIZATION), torch.device("cpu"))
        return tiny.Mlp(dropout=0.0)


def update_by_hand(model: nn.Module, optimizer: SGD, batch: list[list[int]]) -> None:
    inputs, target = tiny.points(size=SIZE).tensors
    for slot in batch:  # BatchNorm sees one slot at a time; the loss is that of the whole batch
        loss = nn.functional.cross_entropy(model(inputs[slot]), target[slot], reduction="sum")
        (loss / sum(map(len, batch))).backward()
    optimizer.step()
    optimizer.zero_grad()


def swa_by_hand(
    strategy: Literal["cos", "linear"], start: int, steps: int | None = None
) -> tuple[nn.Module, list[float]]:
    """The loop of torch's tutorial; with ``steps`` everything late happens by update instead of by epoch."""
    model = initial()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.8)
    averaged = swa_utils.AveragedModel(model)
    late = swa_utils.SWALR(optimizer, swa_lr=0.05, anneal_epochs=3, anneal_strategy=strategy)
    rates, updates = [], 0
    for epoch in range(EPOCHS):
        for batch in slots(epoch):
            rates.append(optimizer.param_groups[0]["lr"])
            update_by_hand(model, optimizer, batch)
            updates += 1
            if steps is not None and updates > start:
                late.step()
                if (updates - start) % steps == 0:
                    averaged.update_parameters(model)
        if steps is None and epoch >= start:
            averaged.update_parameters(model)
            late.step()
        elif steps is None or updates <= start:
            scheduler.step()
    inputs, _ = tiny.points(size=SIZE).tensors
    swa_utils.update_bn([inputs[slot] for batch in slots(EPOCHS - 1) for slot in batch], averaged)
    return averaged.module, rates


def exported(folder: Path, name: str = "averaged.pt", **options: Any) -> dict[str, Tensor]:
    export(folder, folder / name, weights="averaged", warn=lambda text: None, **options)
    return torch.load(folder / name, weights_only=True)


def assert_close(ours: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    assert ours.keys() == truth.keys()
    for name, value in truth.items():
        assert torch.allclose(ours[name], value, rtol=1e-10, atol=1e-12), name


def reported_rates(folder: Path) -> list[float]:
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [record["learning_rate"] for record in records if record["event"] == "train"]


def loss_of(state: dict[str, Tensor]) -> float:
    model = tiny.Mlp(dropout=0.0)
    model.load_state_dict(state)
    inputs, target = tiny.points().tensors
    with torch.no_grad():
        return float(nn.functional.cross_entropy(model.eval()(inputs), target))


@WORLDS
@pytest.mark.parametrize("strategy", ["cos", "linear"])
def test_swa_is_torchs_loop_by_hand(
    pool: ProcessPool, tmp_path: Path, world_size: int, strategy: Literal["cos", "linear"]
) -> None:
    config = run(tmp_path, {**SWA, "anneal": {"epochs": 3, "strategy": strategy}})
    observed = pool.run(observe, world_size, config)
    truth, rates = swa_by_hand(strategy, start=2)
    assert_close(exported(tmp_path), truth.state_dict())
    assert int(exported(tmp_path, "again.pt")["net.1.num_batches_tracked"]) == PER_EPOCH * SLOTS
    assert reported_rates(tmp_path) == pytest.approx(rates, rel=1e-12)
    for reply in observed:
        assert reply["results"] == observed[0]["results"]
    assert observed[0]["results"]["loss"] == pytest.approx(loss_of(truth.state_dict()), rel=1e-10)


def test_swa_by_steps_is_torchs_loop_by_hand(pool: ProcessPool, tmp_path: Path) -> None:
    averaging = {"kind": "swa", "start": "6 steps", "every": "2 steps", "learning_rate": 0.05, "anneal": {"steps": 3}}
    pool.run(observe, 1, run(tmp_path, averaging))
    truth, rates = swa_by_hand("cos", start=6, steps=2)
    assert_close(exported(tmp_path), truth.state_dict())
    assert reported_rates(tmp_path) == pytest.approx(rates, rel=1e-12)


def test_a_start_in_steps_at_the_end_of_an_epoch_is_that_start_in_epochs(pool: ProcessPool, tmp_path: Path) -> None:
    pool.run(observe, 1, run(tmp_path, {**SWA, "start": f"{2 * PER_EPOCH} steps"}))
    truth, rates = swa_by_hand("cos", start=2)
    assert_close(exported(tmp_path), truth.state_dict())
    assert reported_rates(tmp_path) == pytest.approx(rates, rel=1e-12)


@WORLDS
def test_ema_is_torchs_averaged_model(pool: ProcessPool, tmp_path: Path, world_size: int) -> None:
    model = initial()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    averaged = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.8))
    for epoch in range(EPOCHS):
        for batch in slots(epoch):
            update_by_hand(model, optimizer, batch)
            averaged.update_parameters(model)
    config = run(tmp_path, {"kind": "ema", "decay": 0.8}, schedule=None)
    results = pool.run(observe, world_size, config)[0]["results"]
    ours, raw = exported(tmp_path), load_state(newest(tmp_path))[0]
    for name, parameter in averaged.module.named_parameters():
        assert torch.allclose(ours[name], parameter, rtol=1e-10, atol=1e-12), name
    for name, buffer in raw.items():
        if "running" in name or "tracked" in name:
            assert torch.equal(ours[name], buffer)  # the raw statistics are the average's
    assert results["loss"] == pytest.approx(loss_of(ours), rel=1e-10)


@pytest.mark.parametrize(("start", "every"), [(0, 1), (3, 1), (2, 3)])
def test_an_average_warms_up_begins_and_waits_as_its_formula_says(start: int, every: int) -> None:
    module = nn.Linear(1, 1, bias=False).double()
    later = {"start": f"{start} steps"} if start else {}
    section = AveragingSection.model_validate({"decay": 0.4, "warmup": True, "every": f"{every} steps", **later})
    average, taken = WeightAverage(module, section), 0
    expected: float | None = None
    for update in range(1, 15):
        module.weight.data.fill_(float(update**2))
        average.update()
        if update > start and (update - start) % every == 0:
            decay = min(0.4, (1 + taken) / (10 + taken))
            expected = update**2 if expected is None else decay * expected + (1 - decay) * update**2
            taken += 1
        raw = module.weight.item()
        with average.swapped_in():
            assert module.weight.item() == pytest.approx(raw if expected is None else expected, rel=1e-12)
        assert module.weight.item() == raw
        module_again = nn.Linear(1, 1, bias=False).double()
        module_again.load_state_dict(module.state_dict())
        state, module = average.state_dict(), module_again
        average = WeightAverage(module, section)
        average.load_state_dict(state)
    assert average.count == taken > 3


@pytest.mark.parametrize(
    ("world_size", "stops"),
    [
        (1, range(1, 12, 2)),
        (1, range(2, 12, 2)),
        (2, (5, 8)),
        (3, (6, 9)),
    ],
)
def test_swa_that_is_stopped_after_any_step_goes_on_bitwise(
    pool: ProcessPool, tmp_path: Path, world_size: int, stops: Sequence[int]
) -> None:
    changes = {
        "model": {"target": "tiny:Mlp", "args": {"dtype": "float32"}},  # dropout too
        "data": {
            "train": {"target": "tiny:points", "args": {"size": SIZE, "dtype": "float32"}},
            "validation": {"target": "tiny:points", "args": {"dtype": "float32"}},
        },
        "evaluation": {"every": "3 steps"},  # in the middle of epochs too
        "limit": {"epochs": 3},
    }
    averaging = {**SWA, "start": "1 epoch"}
    whole = pool.run(observe, world_size, run(tmp_path / "whole", averaging, **changes))[0]
    config = run(tmp_path / "resumed", averaging, **changes)
    for after in stops:
        stopped = pool.run(observe_stopping, world_size, config, after)[0]
        assert stopped["outcome"] == "stopped"  # after this step, or in an evaluation just before it
        assert stopped["step"] in (after - 1, after)
    resumed = pool.run(observe, world_size, config)[0]
    assert_bitwise_equal(whole, resumed)
    assert resumed["results"] == whole["results"]
    ours, truth = exported(tmp_path / "resumed"), exported(tmp_path / "whole")
    for name, value in truth.items():
        assert torch.equal(ours[name], value), name


def test_statistics_come_back_with_the_average_that_they_are_of() -> None:
    section = AveragingSection.model_validate({"kind": "swa", "start": "1 step", "every": "1 step"})
    average = WeightAverage(nn.BatchNorm1d(2), section)
    for _ in range(3):
        average.update()
    average.set_statistics({name: torch.tensor(3.0) for name in average._buffers})
    other = WeightAverage(nn.BatchNorm1d(2), section)
    other.load_state_dict(average.state_dict())
    assert other.state_dict()["statistics"] == average.state_dict()["statistics"] != {}
    assert not other.lacks_statistics


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("evaluate", [True, False])
def test_a_pass_for_statistics_that_is_cut_short_is_made_up_for(
    pool: ProcessPool, tmp_path: Path, world_size: int, evaluate: bool
) -> None:
    averaging, last = {**SWA, "evaluate": evaluate}, EPOCHS * PER_EPOCH
    whole = pool.run(observe, world_size, run(tmp_path / "whole", averaging))[0]
    config = run(tmp_path / "cut", averaging)
    cut_short = pool.run(observe_leaving_an_evaluation, world_size, config, last)[0]
    assert (cut_short["outcome"], cut_short["step"]) == ("stopped", last)
    with pytest.raises(CheckpointError, match="still to be computed"):
        exported(tmp_path / "cut")
    resumed = pool.run(observe, world_size, config)[0]
    assert resumed["results"] == whole["results"]
    for name, value in exported(tmp_path / "whole").items():
        assert torch.equal(exported(tmp_path / "cut", force=True)[name], value), name


@pytest.mark.parametrize("validation", [{}, {"validation": "tiny:points"}])
def test_without_evaluation_the_statistics_come_at_the_end(
    pool: ProcessPool, tmp_path: Path, validation: dict[str, Any]
) -> None:
    data = {"train": {"target": "tiny:points", "args": {"size": SIZE}}, **validation}
    pool.run(observe, 1, run(tmp_path, {**SWA, "evaluate": False}, data=data))
    truth, _ = swa_by_hand("cos", start=2)
    assert_close(exported(tmp_path), truth.state_dict())
    with pytest.raises(CheckpointError, match="still to be computed"):
        of(tmp_path, 12)
    with pytest.raises(CheckpointError, match=r"before averaging\.start"):
        of(tmp_path, 8)


def test_raw_and_averaged_weights_are_never_mixed_up(pool: ProcessPool, tmp_path: Path) -> None:
    """What is trained does not depend on what is evaluated, and each result is that of the weights it claims to be of."""
    raw = pool.run(observe, 1, run(tmp_path / "raw", {**SWA, "evaluate": False}))[0]
    averaged = pool.run(observe, 1, run(tmp_path / "averaged", SWA))[0]
    assert_bitwise_equal(raw, averaged)
    for folder, weights in ((tmp_path / "raw", "raw"), (tmp_path / "averaged", "averaged")):
        for step in (4, 8, 12, 16):
            (checkpoint,) = (folder / "checkpoints").glob(f"step-{step:08d}*")
            results = json.loads((checkpoint / "state.json").read_text())["results"]
            state = load_state(checkpoint)[0]
            if weights == "averaged" and step > 8:
                state = of(folder, step)
            assert results["loss"] == pytest.approx(loss_of(state), rel=1e-10), (weights, step)
    told = [json.loads(line) for line in (tmp_path / "averaged" / "metrics.jsonl").read_text().splitlines()]
    assert [r["text"] for r in told if r["event"] == "message" and "averaged weights" in r["text"]] == [
        "From step 12 on the averaged weights are evaluated."
    ]


def of(folder: Path, step: int) -> dict[str, Tensor]:
    (checkpoint,) = (folder / "checkpoints").glob(f"step-{step:08d}*")
    export(checkpoint, folder / f"{step}.pt", weights="averaged", warn=lambda text: None)
    return torch.load(folder / f"{step}.pt", weights_only=True)


class Siamese(tiny.Mlp):
    """Calls its BatchNorm twice in each forward pass, and has one that is never called."""

    def __init__(self) -> None:
        super().__init__(dropout=0.0)
        self.unused = nn.BatchNorm1d(3).double()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs) - self.net(inputs.roll(1, dims=-1))


@WORLDS
def test_batch_norms_that_are_called_twice_or_never_are_torchs(
    pool: ProcessPool, tmp_path: Path, world_size: int
) -> None:
    config = run(tmp_path, SWA, model={"target": "tests.test_averaging:Siamese"}, evaluation={"every": "4 epochs"})
    pool.run(observe, world_size, {**config, "strategy": {"ddp": {"find_unused_parameters": True}}})
    ours = exported(tmp_path)
    truth = Siamese()
    truth.load_state_dict(ours)
    inputs, _ = tiny.points(size=SIZE).tensors
    swa_utils.update_bn([inputs[slot] for batch in slots(EPOCHS - 1) for slot in batch], truth)
    assert_close(ours, truth.state_dict())


@pytest.mark.parametrize(
    ("averaging", "key", "words"),
    [
        ("{kind: swa}", "averaging.start", "set when averaging starts"),
        ("{kind: swa, start: 1 epoch, decay: 0.9}", "averaging.decay", "belongs to kind: ema"),
        ("{kind: swa, start: 1 epoch, anneal: {epochs: 3}}", "averaging.anneal", "no 'learning_rate'"),
        ("{learning_rate: 0.1}", "averaging.learning_rate", "belongs to kind: swa"),
        ("{kind: swa, start: 5 epochs}", "averaging.start", "not before the end"),
        ("{start: soon}", "averaging.start", "200 steps"),
    ],
)
def test_a_setting_that_would_be_ignored_is_a_mistake(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], averaging: str, key: str, words: str
) -> None:
    (tmp_path / "c.yaml").write_text(
        "model: tiny:Mlp\ndata: {train: tiny:points}\nbatch: {global_size: 4}\nobjective: CrossEntropyLoss\n"
        f"optimizer: {{target: SGD}}\nlimit: {{epochs: 5}}\naveraging: {averaging}\n"
    )
    assert main(["show", str(tmp_path / "c.yaml")]) == 2
    error = capsys.readouterr().err
    assert key in error
    assert words in error


def newest(folder: Path) -> Path:
    return sorted((folder / "checkpoints").glob("step-*"))[-1]
