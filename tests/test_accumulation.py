"""A global batch is one batch, however it is cut up and shared out: the update is that of the whole, in float64 to 1e-10."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.observed import configuration, largest_difference, observe
from tests.process_pool import ProcessPool

TOLERANCE = 1e-10
# (world size, slots): whole, 1x4, 2x2, 4x1, and ways that do not divide evenly
ALONE = pytest.mark.single
SHARINGS = [
    pytest.param(1, 1, marks=ALONE), pytest.param(1, 4, marks=ALONE), (2, 4), (4, 4), (2, 5), (3, 4), (3, 7), (4, 3),
]  # fmt: skip


def plain_update(model: torch.nn.Module, batches: list[Any], loss_of: Any, lr: float) -> dict[str, np.ndarray]:
    """The independent truth: one process, the whole batch at once, torch's own mean."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for batch in batches:
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        if torch.isfinite(loss):
            loss.backward()
            optimizer.step()
    return {name: value.clone().numpy() for name, value in model.state_dict().items()}


def relative_difference(
    got: dict[str, np.ndarray], start: dict[str, np.ndarray], expected: dict[str, np.ndarray]
) -> float:
    """Largest error of the update, relative to the update."""
    update = max(abs(expected[name] - start[name]).max() for name in expected)
    return float(max(abs(got[name] - expected[name]).max() for name in expected) / update)


def initial(config: dict[str, Any], tmp_path: Path) -> torch.nn.Module:
    """The model as a run would initialise it."""
    from runtime.build.builder import Builder
    from runtime.build.components import check_components
    from runtime.config.file import load

    loaded = load(config)
    check_components(loaded)
    return Builder(loaded).model()


def batches_of(config: dict[str, Any], steps: int) -> list[Any]:
    """The global batches of the first steps, as the order draws them."""
    from runtime.build.builder import Builder
    from runtime.build.components import check_components
    from runtime.config.file import load

    loaded = load(config)
    check_components(loaded)
    builder = Builder(loaded)
    samples = builder.samples("train", batch_size=loaded.values.batch.global_size)
    assert samples is not None
    order = builder.order(samples.source)
    per_epoch = order.num_batches(0)
    return [samples.source[torch.from_numpy(order.batch(s // per_epoch, s % per_epoch))] for s in range(steps)]


def classification(folder: Path, size: int, **changes: Any) -> dict[str, Any]:
    return configuration(
        folder,
        model={"target": "tiny:Mlp", "args": {"dropout": 0.0, "batch_norm": False}},
        data={"train": {"target": "tiny:points", "args": {"size": size}}},
        optimizer={"target": "SGD", "args": {"lr": 0.5}},
        **changes,
    )


def tagging(folder: Path, **changes: Any) -> dict[str, Any]:
    return configuration(
        folder,
        model={"target": "tiny:Tagger"},
        data={"train": {"target": "tiny:tokens", "args": changes.pop("tokens", {})}},
        objective="NextTokenLoss",
        optimizer={"target": "SGD", "args": {"lr": 0.5}},
        **changes,
    )


def token_loss(model: torch.nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


@pytest.mark.parametrize(("world_size", "slots"), SHARINGS)
def test_the_update_is_that_of_the_whole_batch_and_of_a_ragged_one(
    pool: ProcessPool, tmp_path: Path, world_size: int, slots: int
) -> None:
    # 40 samples in batches of 16: the third step has 8, and for 4 ranks of 3 slots one rank has none
    config = classification(tmp_path, 40, batch={"global_size": 16, "slots": slots}, limit={"steps": 4})
    model = initial(config, tmp_path)
    start = {name: value.clone().numpy() for name, value in model.state_dict().items()}
    expected = plain_update(model, batches_of(config, 4), lambda m, b: F.cross_entropy(m(b[0]), b[1]), lr=0.5)
    for ranks in pool.run(observe, world_size, config):
        assert relative_difference(ranks["weights"], start, expected) < TOLERANCE


@pytest.mark.parametrize(("world_size", "slots"), SHARINGS)
def test_tokens_of_very_uneven_sentences_count_equally(
    pool: ProcessPool, tmp_path: Path, world_size: int, slots: int
) -> None:
    config = tagging(tmp_path, batch={"global_size": 16, "slots": slots}, limit={"steps": 3})
    model = initial(config, tmp_path)
    start = {name: value.clone().numpy() for name, value in model.state_dict().items()}
    batches = batches_of(config, 3)
    expected = plain_update(model, batches, token_loss, lr=0.5)
    (first, *_) = pool.run(observe, world_size, config)
    assert relative_difference(first["weights"], start, expected) < TOLERANCE
    # The reported loss is the mean over the step's tokens, too.
    model.load_state_dict({name: torch.from_numpy(value) for name, value in start.items()})
    assert first["losses"][1] == pytest.approx(token_loss(model, batches[0]).item(), rel=1e-12)


@pytest.mark.single
def test_a_mean_of_means_would_be_caught(tmp_path: Path) -> None:
    config = tagging(tmp_path, batch={"global_size": 16, "slots": 4}, limit={"steps": 1})
    model = initial(config, tmp_path)
    start = {name: value.clone().numpy() for name, value in model.state_dict().items()}
    (batch,) = batches_of(config, 1)
    expected = plain_update(model, [batch], token_loss, lr=0.5)
    model.load_state_dict({name: torch.from_numpy(value) for name, value in start.items()})

    def mean_of_means(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        quarters = zip(batch[0].chunk(4), batch[1].chunk(4), strict=True)
        return torch.stack([token_loss(model, quarter) for quarter in quarters if (quarter[1] != -100).any()]).mean()

    wrong = plain_update(model, [batch], mean_of_means, lr=0.5)
    assert relative_difference(wrong, start, expected) > 0.01


# Stepping on each microbatch, and on the first alone; dividing each by its own weight, or by none; leaving out the
# remainder of a ragged batch, and dividing it by the full number. Each is what the grid above would show.
def each(module: torch.nn.Module, batch: Any) -> list[torch.Tensor]:
    cut = [(x, y) for x, y in zip(batch[0].chunk(4), batch[1].chunk(4), strict=True)]
    return [F.cross_entropy(module(x), y, reduction="sum") for x, y in cut]


WRONG: dict[str, Any] = {
    "first microbatch alone": lambda m, b: each(m, b)[0] / (len(b[1]) / 4),
    "not divided by the number of microbatches": lambda m, b: sum(each(m, b)) / 4,
    "not divided at all": lambda m, b: sum(each(m, b)),
    "remainder forgotten": lambda m, b: sum(each(m, b)) / 16 if len(b[1]) == 16 else torch.tensor(float("nan")),
    "remainder divided by the full number": lambda m, b: sum(each(m, b)) / 16,
}


@pytest.mark.single
@pytest.mark.parametrize("mistake", WRONG)
def test_a_classic_mistake_would_be_caught(tmp_path: Path, mistake: str) -> None:
    config = classification(tmp_path, 40, batch={"global_size": 16, "slots": 4}, limit={"steps": 4})
    model = initial(config, tmp_path)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    batches = batches_of(config, 4)
    right = plain_update(model, batches, lambda m, b: sum(each(m, b)) / len(b[1]), lr=0.5)
    model.load_state_dict(start)
    wrong = plain_update(model, batches, WRONG[mistake], lr=0.5)
    assert relative_difference(wrong, {name: value.numpy() for name, value in start.items()}, right) > 0.01


@pytest.mark.single
def test_there_is_one_update_for_all_microbatches_of_a_step(tmp_path: Path) -> None:
    config = classification(tmp_path, 40, batch={"global_size": 16, "slots": 4}, limit={"epochs": 2})
    config["schedule"] = {"target": "StepLR", "args": {"step_size": 1, "gamma": 0.5}}
    observe(config)
    state = saved_state(tmp_path, 6)  # 40 samples are two batches of 16 and a remainder of 8
    assert state["progress"]["updates"] == state["schedule"]["updates"] == 6


@pytest.mark.parametrize(("world_size", "slots"), [pytest.param(1, 2, marks=ALONE), (2, 2), (3, 4)])
def test_a_window_without_any_target_updates_nothing(
    pool: ProcessPool, tmp_path: Path, world_size: int, slots: int
) -> None:
    # In sequence, the second of three batches is masked altogether; momentum would move weights even at zero gradient.
    config = tagging(tmp_path, tokens={"size": 16, "masked_from": 8}, batch={"global_size": 8, "slots": slots})
    config["data"]["shuffle"] = False
    config["optimizer"]["args"]["momentum"] = 0.9
    config["schedule"] = {"target": "ExponentialLR", "args": {"gamma": 0.5}}
    after_one = pool.run(observe, world_size, {**config, "output": f"{tmp_path}/one"}, "limit.steps=1")
    after_two = pool.run(observe, world_size, {**config, "output": f"{tmp_path}/two"}, "limit.steps=2")
    for one, two in zip(after_one, after_two, strict=True):
        assert all(one["weights"][name].tobytes() == two["weights"][name].tobytes() for name in one["weights"])
    state = saved_state(tmp_path / "two", 2)
    assert state["progress"]["step"] == 2
    assert state["progress"]["updates"] == 1
    assert state["progress"]["skipped_steps"] == [2]
    assert state["schedule"]["updates"] == 1


def saved_state(folder: Path, step: int) -> dict[str, Any]:
    from runtime.checkpoints.load import load_state

    return load_state(folder / "checkpoints" / f"step-{step:08d}")[1]


def observe_poisoned(config: dict[str, Any], poisoned: int) -> dict[str, Any]:
    """Make the loss of fillers infinite: they are recognised by the samples they reuse, of which they hold all."""
    import sys

    from runtime.objective import TrainingModule

    forward = TrainingModule.forward

    def poisoning(self: Any, batch: Any, filler: bool = False) -> Any:
        project = sys.modules["tiny"]
        project.InfiniteOnFillers.poisoned = staticmethod(lambda target: filler)
        return forward(self, batch, filler)

    TrainingModule.forward = poisoning  # type: ignore[method-assign]
    try:
        return observe(config)
    finally:
        TrainingModule.forward = forward  # type: ignore[method-assign]


def test_a_filler_whose_loss_is_infinite_counts_for_nothing(pool: ProcessPool, tmp_path: Path) -> None:
    config = classification(tmp_path / "a", 40, batch={"global_size": 16, "slots": 4}, limit={"steps": 4})
    config["objective"] = "tiny:InfiniteOnFillers"
    model = initial(config, tmp_path)
    start = {name: value.clone().numpy() for name, value in model.state_dict().items()}
    expected = plain_update(model, batches_of(config, 4), lambda m, b: (m(b[0]) - 1).square().sum() / len(b[1]), lr=0.5)
    for ranks in pool.run(observe_poisoned, 3, config, 0):
        assert relative_difference(ranks["weights"], start, expected) < TOLERANCE


def test_dropout_and_batch_norm_give_the_same_run_for_any_world_size(pool: ProcessPool, tmp_path: Path) -> None:
    runs = {}
    for world_size in (1, 2, 3, 4):
        config = configuration(
            tmp_path / str(world_size),
            data={
                "train": {"target": "tiny:points", "args": {"size": 90}},
                "validation": {"target": "tiny:points", "args": {"split": "validation", "size": 31}},
            },
            limit={"steps": 20},
            evaluation={"every": "4 steps"},
            checkpoint={"every": "7 steps"},
        )
        ranks = pool.run(observe, world_size, config)
        # Buffers are bit for bit equal on all ranks at every evaluation and save.
        assert len(ranks[0]["buffers"]) > 20
        assert all(other["buffers"] == ranks[0]["buffers"] for other in ranks)
        assert all(other["results"] == ranks[0]["results"] for other in ranks)
        runs[world_size] = ranks[0]
    for world_size in (2, 3, 4):
        assert largest_difference(runs[1], runs[world_size]) < TOLERANCE
        for step, loss in runs[1]["losses"].items():
            assert runs[world_size]["losses"][step] == pytest.approx(loss, rel=TOLERANCE)
        assert runs[world_size]["results"]["loss"] == pytest.approx(runs[1]["results"]["loss"], rel=TOLERANCE)
    assert runs[1]["weights"]["net.1.num_batches_tracked"] == 20  # once per step, not per slot


@ALONE
def test_every_slot_of_every_step_draws_numbers_of_its_own(tmp_path: Path) -> None:
    """One seed for all slots, or for all steps, would be equal on any number of processes, too."""
    model = {"target": "tiny:Drawing", "args": {}}
    observe(configuration(tmp_path, model=model, limit={"steps": 3}, checks="off"))  # which draw as well
    drawn = sys.modules["tiny"].Drawing.drawn[-3 * 4 :]
    assert len(set(drawn)) == 3 * 4


def test_batch_norm_statistics_are_the_mean_over_slots(pool: ProcessPool, tmp_path: Path) -> None:
    config = configuration(tmp_path, model={"target": "tiny:Mlp", "args": {"dropout": 0.0}}, limit={"steps": 1})
    model: Any = initial(config, tmp_path).train()
    (batch,) = batches_of(config, 1)
    means = []
    for inputs in batch[0].chunk(4):
        model.net[1].reset_running_stats()
        model(inputs)
        means.append(model.net[1].running_mean.clone())
    expected = torch.stack(means).mean(0).numpy()
    for world_size in (1, 3):
        config["output"] = f"{tmp_path}/{world_size}"
        got = pool.run(observe, world_size, config)[0]["weights"]["net.1.running_mean"]
        assert got == pytest.approx(expected, rel=1e-12)


def test_an_objective_may_call_the_model_twice_and_learn_a_temperature(pool: ProcessPool, tmp_path: Path) -> None:
    runs = []
    for world_size in (1, 2, 3):
        config = configuration(
            tmp_path / str(world_size),
            model="tiny:Encoder",
            objective="tiny:PairObjective",
            optimizer={"target": "AdamW", "args": {"lr": 0.01}, "max_grad_norm": 0.5},
        )
        runs.append(pool.run(observe, world_size, config)[0])
        temperature = saved_state(tmp_path / str(world_size), 5)["objective"]["temperature"]
        assert float(temperature) != 1.5
        runs[-1]["weights"]["temperature"] = temperature.numpy()
    assert largest_difference(runs[0], runs[1]) < TOLERANCE
    assert largest_difference(runs[0], runs[2]) < TOLERANCE


def test_clipping_uses_the_norm_of_the_whole_gradient(pool: ProcessPool, tmp_path: Path) -> None:
    config = classification(tmp_path, 32, batch={"global_size": 16, "slots": 4}, limit={"steps": 1})
    config["optimizer"]["max_grad_norm"] = 0.01
    model = initial(config, tmp_path)
    (batch,) = batches_of(config, 1)
    start = {name: value.clone().numpy() for name, value in model.state_dict().items()}
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01))
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    expected = {name: (p - 0.5 * gradients[name]).detach().numpy() for name, p in model.named_parameters()}
    for world_size in (1, 2):
        config["output"] = f"{tmp_path}/{world_size}"
        run = pool.run(observe, world_size, config)[0]
        assert relative_difference(run["weights"], start, expected) < TOLERANCE
        assert run["norms"][1] == pytest.approx(norm, rel=1e-12)


def test_what_a_data_set_draws_while_it_is_built_is_equal_on_all_ranks(pool: ProcessPool, tmp_path: Path) -> None:
    runs = []
    for world_size in (1, 2):
        config = configuration(tmp_path / str(world_size), data={"train": {"target": "tiny:drawn"}})
        runs.append(pool.run(observe, world_size, config)[0])
    assert largest_difference(*runs) < TOLERANCE
