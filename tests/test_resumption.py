"""A run that was stopped at any step goes on as if nothing had happened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runtime.training.observers import StepReport
from tests.observed import assert_bitwise_equal, configuration, largest_difference, observe
from tests.process_pool import ProcessPool

STEPS = 9  # of 5 per epoch: stopping after 3 or 7 is in the middle of an epoch


def deep(folder: Path, **changes: Any) -> dict[str, Any]:
    """Dropout, shuffling, AdamW, warm-up and cosine, and a model of at least three DDP buckets, in float32."""
    return configuration(
        folder,
        **{
            "model": {"target": "tiny:Deep", "args": {}},
            "data": {"train": {"target": "tiny:points", "args": {"size": 75, "dtype": "float32"}}},
            "batch": {"global_size": 16, "slots": 6},
            "optimizer": {"target": "AdamW", "args": {"lr": 0.01}, "max_grad_norm": 1.0},
            "schedule": {"target": "CosineAnnealingLR", "args": {"T_max": STEPS}, "warmup_steps": 2},
            "averaging": {"decay": 0.9},
            "limit": {"steps": STEPS},
            "strategy": {"ddp": {"bucket_mb": 0.01}},
            **changes,
        },
    )


def observe_stopping(config: dict[str, Any], after: int | None) -> dict[str, Any]:
    """Train, asked to stop after a step (each rank's own wish is what the ranks agree on)."""
    from runtime.distributed import collectives
    from runtime.distributed.stopping import StopRequest
    from runtime.training.progress import Progress

    if after is None:
        return observe(config)
    seconds_between, collectives._SECONDS_BETWEEN = collectives._SECONDS_BETWEEN, 0.0  # agree before every step
    advance, noted = Progress.advance, []

    def noting(self: Any, window: Any) -> None:
        advance(self, window)
        noted.append(self.step)

    Progress.advance = noting  # type: ignore[method-assign]
    bool_of = StopRequest.__bool__
    # Read before a step and acted on after it; an evaluation that follows the step before is cut short.
    StopRequest.__bool__ = lambda self: (bool(noted) and noted[-1] + 1 >= after) or after == 1  # type: ignore[method-assign]
    try:
        return observe(config)
    finally:
        Progress.advance, StopRequest.__bool__ = advance, bool_of  # type: ignore[method-assign]
        collectives._SECONDS_BETWEEN = seconds_between


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.single), 2, 3])
def test_a_run_resumed_twice_is_bitwise_equal_to_the_uninterrupted_run(
    pool: ProcessPool, tmp_path: Path, world_size: int
) -> None:
    whole = pool.run(observe, world_size, deep(tmp_path / "whole"))[0]
    config = deep(tmp_path / "resumed")
    for after in (3, 7):
        stopped = pool.run(observe_stopping, world_size, config, after)[0]
        assert (stopped["outcome"], stopped["step"]) == ("stopped", after)
    resumed = pool.run(observe, world_size, config)[0]
    assert resumed["outcome"] == "finished"
    assert_bitwise_equal(whole, resumed)
    assert resumed["losses"] == whole["losses"]
    assert averages(tmp_path / "whole") == averages(tmp_path / "resumed")


@pytest.mark.single
@pytest.mark.parametrize("after", [1, 2, 4, 5, 6, 8])
def test_stopping_after_any_step_changes_nothing(pool: ProcessPool, tmp_path: Path, after: int) -> None:
    whole = pool.run(observe, 1, deep(tmp_path / "whole"))[0]
    config = deep(tmp_path / "resumed")
    assert pool.run(observe_stopping, 1, config, after)[0]["step"] == after
    assert_bitwise_equal(whole, pool.run(observe, 1, config)[0])


def test_a_run_may_go_on_with_any_number_of_processes(pool: ProcessPool, tmp_path: Path) -> None:
    changes = {
        "model": {"target": "tiny:Mlp", "args": {}},  # dropout and BatchNorm
        "data": {"train": {"target": "tiny:points", "args": {"size": 76}}},  # BatchNorm needs 2 samples in each slot
    }
    whole = pool.run(observe, 2, deep(tmp_path / "whole", **changes))[0]
    config = deep(tmp_path / "resumed", **changes)
    for world_size, after in ((2, 3), (1, 5), (3, 7), (2, None)):
        resumed = pool.run(observe_stopping, world_size, config, after)[0]
    assert resumed["step"] == STEPS
    assert largest_difference(whole, resumed) < 1e-10
    assert list(resumed["losses"]) == list(whole["losses"])
    for step, loss in whole["losses"].items():  # the same samples at the same steps, under the same seeds
        assert resumed["losses"][step] == pytest.approx(loss, rel=1e-10)


def test_slots_follow_from_the_first_start_and_are_kept(pool: ProcessPool, tmp_path: Path) -> None:
    config = deep(tmp_path, batch={"global_size": 16})
    pool.run(observe_stopping, 3, config, 2)
    pool.run(observe, 1, config)
    assert saved(tmp_path, STEPS)["identity"]["slots"] == 3


@pytest.mark.single
def test_a_finished_run_says_so_and_goes_on_when_its_limit_is_raised(pool: ProcessPool, tmp_path: Path) -> None:
    config = deep(tmp_path / "short", limit={"epochs": 1})
    first = pool.run(observe, 1, config)[0]
    again = pool.run(observe, 1, config)[0]
    assert (again["outcome"], again["step"]) == ("finished", 5)
    assert_bitwise_equal(first, again)
    raised = pool.run(observe, 1, deep(tmp_path / "short", limit={"epochs": 2}))[0]
    whole = pool.run(observe, 1, deep(tmp_path / "long", limit={"epochs": 2}))[0]
    assert_bitwise_equal(whole, raised)


@pytest.mark.single
@pytest.mark.parametrize(
    ("optimizer", "scheduler", "args", "interval"),
    [
        ("SGD", "MultiStepLR", {"milestones": [2, 4]}, "step"),
        ("Adagrad", "StepLR", {"step_size": 1}, "epoch"),
        ("RMSprop", "OneCycleLR", {"max_lr": 0.1}, "step"),
        ("NAdam", "OneCycleLR", {"max_lr": 0.1}, "step"),
        ("Adafactor", "ExponentialLR", {"gamma": 0.9}, "epoch"),
    ],
)
def test_optimizers_and_schedules_resume_bitwise(
    pool: ProcessPool, tmp_path: Path, optimizer: str, scheduler: str, args: dict[str, Any], interval: str
) -> None:
    changes = {
        "optimizer": {
            "target": optimizer,
            "args": {"lr": 0.01, **({"momentum": 0.9} if optimizer in ("SGD", "RMSprop") else {})},
        },
        "schedule": {"target": scheduler, "args": args, "interval": interval, "warmup_steps": 1},
        "limit": {"steps": 7},
    }
    whole = pool.run(observe, 1, deep(tmp_path / "whole", **changes))[0]
    config = deep(tmp_path / "resumed", **changes)
    pool.run(observe_stopping, 1, config, 3)
    assert_bitwise_equal(whole, pool.run(observe, 1, config)[0])


def plateau(folder: Path) -> dict[str, Any]:
    """The rate falls at each evaluation that is no better, which none can be."""
    args = {"factor": 0.5, "patience": 0, "threshold": 1e9}
    points = {"target": "tiny:points", "args": {"size": 75, "dtype": "float32"}}
    return deep(
        folder,
        data={"train": points, "validation": {"target": "tiny:points", "args": {"split": "v", "dtype": "float32"}}},
        schedule={"target": "ReduceLROnPlateau", "args": args, "monitor": "loss"},
        evaluation={"every": "2 steps", "micro_size": 8},
        checkpoint={"every": "4 steps", "best": [{"metric": "loss", "mode": "min"}]},
    )


def observe_leaving_an_evaluation(config: dict[str, Any], step: int) -> dict[str, Any]:
    """Train, asked to stop in the second round of the evaluation after a step, or of what it needs."""
    from runtime.distributed import collectives
    from runtime.distributed.stopping import StopRequest

    seconds_between, collectives._SECONDS_BETWEEN = collectives._SECONDS_BETWEEN, 0.0
    bool_of = StopRequest.__bool__
    before: list[Any] = []
    asked: list[Any] = []

    def is_asked(self: Any) -> bool:
        asked.extend(before)  # once before the step, then before each round
        return len(asked) > 2

    def wait(report: StepReport) -> None:
        if report.step == step - 1:
            before.append(report.step)

    StopRequest.__bool__ = is_asked  # type: ignore[method-assign]
    try:
        return observe(config, observers=[wait])
    finally:
        StopRequest.__bool__ = bool_of  # type: ignore[method-assign]
        collectives._SECONDS_BETWEEN = seconds_between


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.single), 2])
@pytest.mark.parametrize("step", [2, 4, STEPS])
def test_an_evaluation_that_was_cut_short_is_made_up_for_and_changes_nothing(
    pool: ProcessPool, tmp_path: Path, world_size: int, step: int
) -> None:
    whole = pool.run(observe, world_size, plateau(tmp_path / "whole"))[0]
    config = plateau(tmp_path / "cut")
    cut = pool.run(observe_leaving_an_evaluation, world_size, config, step)[0]
    assert (cut["outcome"], cut["step"]) == ("stopped", step)
    resumed = pool.run(observe, world_size, config)[0]
    assert resumed["outcome"] == "finished"
    assert_bitwise_equal(whole, resumed)
    assert resumed["results"] == whole["results"]
    assert saved_bytes(tmp_path / "whole") == saved_bytes(tmp_path / "cut")  # the plateau's memory too
    assert rates(tmp_path / "cut") == rates(tmp_path / "whole")
    assert best(tmp_path / "cut") == best(tmp_path / "whole")


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.single), 2])
def test_loss_scale_average_and_schedule_survive_a_resumption(
    pool: ProcessPool, tmp_path: Path, world_size: int
) -> None:
    """The third step overflows, so that the scale is not what it begins with."""
    changes = {"precision": "fp16", "objective": "tiny_divergence:Astray", "batch": {"global_size": 16, "slots": 4}}
    changes["data"] = {"train": {"target": "tiny:points", "args": {"dtype": "float32"}}}
    pool.run(observe, world_size, deep(tmp_path / "whole", **changes))
    config = deep(tmp_path / "resumed", **changes)
    pool.run(observe_stopping, world_size, config, 5)
    at_stop = saved(tmp_path / "resumed", 5)
    pool.run(observe, world_size, config)
    assert saved_bytes(tmp_path / "whole") == saved_bytes(tmp_path / "resumed")
    for state in (at_stop, saved(tmp_path / "resumed", STEPS)):
        skipped = state["progress"]["skipped_steps"]
        assert state["strategy"]["scaler"]["scale"] == 2.0 ** (16 - len(skipped))  # torch begins with 2^16
        assert state["strategy"]["scaler"]["_growth_tracker"] == state["progress"]["step"] - skipped[-1]
    assert 3 in skipped


def observe_rates(config: dict[str, Any], after: int | None) -> list[list[float]]:
    """Train, and return the rates of every group that the optimizer of this rank had in each of its steps."""
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    noted: list[list[float]] = []
    hook = register_optimizer_step_pre_hook(
        lambda optimizer, *_: noted.append([float(group["lr"]) for group in optimizer.param_groups])
    )
    try:
        observe_stopping(config, after)
    finally:
        hook.remove()
    return noted


def test_learning_rates_are_equal_on_all_ranks_at_every_step_also_over_a_resumption(
    pool: ProcessPool, tmp_path: Path
) -> None:
    groups = [{"match": ["*.bias"], "args": {"lr": 0.003}}]
    optimizer = {"target": "AdamW", "args": {"lr": 0.01}, "groups": groups}
    whole = pool.run(observe_rates, 3, {**plateau(tmp_path / "whole"), "optimizer": optimizer}, None)
    assert whole == [whole[0]] * 3
    assert [len(rates) for rates in whole[0]] == [2] * STEPS
    assert len({rate for rates in whole[0] for rate in rates}) > 6  # they do change
    config = {**plateau(tmp_path / "resumed"), "optimizer": optimizer}
    first, second = pool.run(observe_rates, 3, config, 5), pool.run(observe_rates, 2, config, None)
    assert (first, second) == ([first[0]] * 3, [second[0]] * 2)
    assert first[0] + second[0] == whole[0]


def rates(folder: Path) -> list[float]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record["learning_rate"] for record in records if record["event"] == "train"]


def best(folder: Path) -> Any:
    record = json.loads((folder / "checkpoints" / "best.json").read_text())["loss"]
    return [(entry["step"], entry["value"]) for entry in record]


@pytest.mark.parametrize(
    ("world_size", "stops", "mode", "keep"),
    [
        pytest.param(1, (1, 3, 5, 8), "max", 2, marks=pytest.mark.single),
        pytest.param(1, (2, 4, 7), "min", 1, marks=pytest.mark.single),
        (2, (3, 6), "max", 2),
    ],
)
def test_which_checkpoints_are_the_best_follows_from_all_evaluations_and_no_interruption(
    pool: ProcessPool, tmp_path: Path, world_size: int, stops: tuple[int, ...], mode: str, keep: int
) -> None:
    """Evaluations and saves hardly coincide; a run that is stopped saves at other steps too."""
    changes = {
        "data": {
            "train": {"target": "tiny:points", "args": {"size": 75, "dtype": "float32"}},
            "validation": {"target": "tiny:points", "args": {"split": "v", "dtype": "float32"}},
        },
        "optimizer": {"target": "SGD", "args": {"lr": 1.0}},  # so large that the loss goes up and down
        "evaluation": {"every": "2 steps"},
        "checkpoint": {"every": "4 steps", "keep": 1, "best": [{"metric": "loss", "mode": mode, "keep": keep}]},
        "checks": "off",  # which refuse to keep the worst as the best
    }
    whole, cut = deep(tmp_path / "whole", **changes), deep(tmp_path / "cut", **changes)
    pool.run(observe, world_size, whole)
    for after in stops:
        stopped = pool.run(observe_stopping_between_evaluations, world_size, cut, after)[0]
        assert (stopped["outcome"], stopped["step"]) == ("stopped", after)
    pool.run(observe, world_size, cut)
    (tmp_path / "cut" / "checkpoints" / "best.json").unlink()  # a kill came before it was written
    pool.run(observe, world_size, cut)
    ordered = sorted(evaluations(tmp_path / "whole").items(), key=lambda entry: entry[1], reverse=mode == "max")
    assert len(ordered) == 5
    assert best(tmp_path / "whole") == best(tmp_path / "cut") == ordered[:keep]
    for step, _ in ordered[:keep]:
        assert weights_of(tmp_path / "whole", step) == weights_of(tmp_path / "cut", step)


def observe_stopping_between_evaluations(config: dict[str, Any], after: int) -> dict[str, Any]:
    """Train, asked to stop after a step; evaluations are made to their end."""
    from runtime.evaluation.evaluator import Evaluator

    evaluate = Evaluator.evaluate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Evaluator, "evaluate", lambda self, stop_requested: evaluate(self))
        return observe_stopping(config, after)


def evaluations(folder: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["loss"] for record in records if record["event"] == "evaluation"}


def weights_of(folder: Path, step: int) -> bytes:
    from runtime.checkpoints.load import damage_of

    (checkpoint,) = (folder / "checkpoints").glob(f"step-{step:08d}-epoch-*")
    assert damage_of(checkpoint) is None
    return (checkpoint / "model.safetensors").read_bytes()


@pytest.mark.single
def test_records_of_repeated_steps_are_dropped(pool: ProcessPool, tmp_path: Path) -> None:
    config = deep(tmp_path)
    pool.run(observe_stopping, 1, config, 3)
    with (tmp_path / "metrics.jsonl").open("a") as file:  # a killed run got further than its checkpoint
        file.write('{"event": "train", "step": 4, "loss": 99.0}\n{"event": "train", "st')
    resumed = pool.run(observe, 1, config)[0]
    assert sorted(resumed["losses"]) == list(range(1, STEPS + 1))
    assert resumed["losses"][4] != 99.0


def saved_bytes(folder: Path) -> dict[str, bytes]:
    """Return all of the last state but what names the start that saved it."""
    from runtime.checkpoints.serialization import split_state

    kept = {key: value for key, value in saved(folder, STEPS).items() if key not in ("identity", "made_by")}
    tree, tensors = split_state(kept)
    return {"tree": repr(tree).encode(), **{name: value.numpy().tobytes() for name, value in tensors.items()}}


def averages(folder: Path) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in saved(folder, STEPS)["averaging"]["average"].items()}


def saved(folder: Path, step: int) -> dict[str, Any]:
    from runtime.checkpoints.load import load_state

    (path,) = (folder / "checkpoints").glob(f"step-{step:08d}*")
    return load_state(path)[1]
