"""ZeRO through DeepSpeed: every stage trains what DDP trains, saves what DDP saves, and goes on from either."""

from __future__ import annotations

import json
import re
from functools import partial
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("deepspeed", reason="needs the extra deepspeed")

from runtime.errors import ConfigurationError, DivergenceError
from tests.compared_weights import SAME_OUTPUT, Truth
from tests.observed import configuration, observe
from tests.process_pool import ProcessPool, RemoteError
from tests.test_resumption import observe_stopping

ROOT = Path(__file__).parents[1]
STAGES = pytest.mark.parametrize("stage", [1, 2, 3])
LONG = pytest.mark.long
# The other stages have less that could go wrong here, and are left to make test-long.
THIRD_STAGE = pytest.mark.parametrize("stage", [pytest.param(1, marks=LONG), pytest.param(2, marks=LONG), 3])
# Float32, and sums in another order. Measured: 9e-7, but for elements whose true gradient is zero (compared_weights.py).
WEIGHTS = 5e-6
RELATIVE = 1e-4  # of the optimizer's state, to the largest element of each tensor; measured: 1e-5
TOLERANCE = 1e-4  # of losses and norms, relative
PERSISTENT_NONE = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}  # so small a model would stay whole


def zero(stage: int, **options: Any) -> dict[str, Any]:
    return {"kind": "zero", "zero": {"stage": stage, "extra": PERSISTENT_NONE, **options}}


def gpt(folder: Path, **changes: Any) -> dict[str, Any]:
    """The GPT of configs/ shrunk: sentences of very uneven length, some without a target; five slots, so two ranks accumulate
    three microbatches, one of them a filler; two groups of parameters, dropout, clipping, warm-up and cosine."""
    size = {"vocab_size": 11, "context_length": 12, "num_layers": 2, "num_heads": 2, "width": 16, "dropout": 0.1}
    return configuration(
        folder,
        **{
            "model": {"target": "GPT", "args": size},
            "data": {"train": {"target": "tiny:tokens", "args": {"size": 60}}},
            "objective": "NextTokenLoss",
            "batch": {"global_size": 13, "slots": 5},
            "optimizer": {
                "target": "AdamW",
                "args": {"lr": 0.01, "weight_decay": 0.1},
                "max_grad_norm": 1.0,
                "no_decay": True,
            },
            "schedule": {"target": "CosineAnnealingLR", "warmup_steps": 3, "args": {"T_max": 30}},
            "limit": {"steps": 20},
            **changes,
        },
    )


def saved(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The newest checkpoint's model and training state."""
    from runtime.checkpoints.load import load_state

    path = max(path for path in (folder / "checkpoints").glob("step-????????"))
    return load_state(path)


def differences(expected: Path, got: Path) -> dict[str, float]:
    """Largest absolute differences of what two runs saved, for runs that must be bitwise equal; nothing may be missing,
    empty or of another shape."""
    (model, training), (other_model, other_training) = saved(expected), saved(got)
    assert model.keys() == other_model.keys()
    optimizer, other_optimizer = training["optimizer"], other_training["optimizer"]
    assert optimizer["param_groups"] == other_optimizer["param_groups"]
    assert optimizer["state"].keys() == other_optimizer["state"].keys()
    assert training["progress"] == other_training["progress"]
    assert training["schedule"] == other_training["schedule"]
    found = {"weights": largest(model, other_model), "optimizer": 0.0, "average": 0.0}
    for number, entry in optimizer["state"].items():
        found["optimizer"] = max(found["optimizer"], largest(entry, other_optimizer["state"][number]))
    if training["averaging"] is not None:
        assert training["averaging"]["count"] == other_training["averaging"]["count"]
        found["average"] = largest(training["averaging"]["average"], other_training["averaging"]["average"])
    return found


def largest(expected: dict[str, Any], got: dict[str, Any]) -> float:
    assert expected.keys() == got.keys()
    worst = 0.0
    for name, value in expected.items():
        assert torch.as_tensor(value).shape == torch.as_tensor(got[name]).shape, name
        worst = max(worst, float((torch.as_tensor(value) - torch.as_tensor(got[name])).abs().max()))
    return worst


def assert_saved_alike(expected: Path, got: Path, *, weights: float = WEIGHTS) -> None:
    """Refuse two runs that differ by more than float32's rounding in anything that they saved."""
    differences(expected, got)  # names, shapes, counters, schedule
    (model, training), (other_model, other_training) = saved(expected), saved(got)
    truth = Truth(expected)
    pairs = [(model, other_model)]
    if training["averaging"] is not None:
        pairs.append((averaged(model, training), averaged(other_model, other_training)))
    for one, other in pairs:
        found = truth.difference(one, other)
        assert found.held < weights, found
        assert found.output < SAME_OUTPUT, found
    for number, entry in training["optimizer"]["state"].items():
        for name, value in entry.items():
            scale = max(float(torch.as_tensor(value).abs().max()), 1e-30)
            apart = largest({name: value}, {name: other_training["optimizer"]["state"][number][name]})
            assert apart / scale < RELATIVE, f"{name} of parameter {number}"


def averaged(model: dict[str, Any], training: dict[str, Any]) -> dict[str, Any]:
    average = training["averaging"]["average"]
    return {**model, **{name.removeprefix("model."): value for name, value in average.items()}}


def relative(expected: dict[int, float], got: dict[int, float]) -> float:
    assert expected.keys() == got.keys()
    return max(abs(got[step] - value) / abs(value) for step, value in expected.items())


@pytest.fixture(scope="module")
def reference(pool: ProcessPool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ddp")
    return folder, pool.run(observe, 2, gpt(folder))[0]


@STAGES
def test_each_stage_trains_what_ddp_trains(
    pool: ProcessPool, tmp_path: Path, reference: tuple[Path, dict[str, Any]], stage: int
) -> None:
    folder, expected = reference
    got = pool.run(observe, 2, gpt(tmp_path, strategy=zero(stage)))[0]
    assert relative(expected["losses"], got["losses"]) < TOLERANCE
    assert relative(expected["norms"], got["norms"]) < TOLERANCE
    assert_saved_alike(folder, tmp_path)


def divided_wrongly(config: dict[str, Any], mistake: str) -> dict[str, Any]:
    """Train with a classic mistake in the strategy."""
    from runtime.objective import starting_gradient

    def wrong(loss: Tensor, weight: Any, *, scale: float) -> Tensor:
        if mistake == "mean over ranks":
            return starting_gradient(loss, weight, scale=1.0)
        # Each microbatch by its own weight, as engines do: here three quarters of the sentences have few tokens.
        return starting_gradient(loss, max(float(loss.detach()) / 2.0, 1.0), scale=scale)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("runtime.strategies.zero.strategy.starting_gradient", wrong)
        return observe(config)


@pytest.mark.parametrize("mistake", ["mean over ranks", "mean of means"])
def test_a_wrong_division_would_be_caught(
    pool: ProcessPool, tmp_path: Path, reference: tuple[Path, dict[str, Any]], mistake: str
) -> None:
    config = gpt(tmp_path, strategy=zero(2), limit={"steps": 3})
    got = pool.run(divided_wrongly, 2, config, mistake)[0]
    expected = {step: reference[1]["norms"][step] for step in got["norms"]}
    assert relative(expected, got["norms"]) > 100 * TOLERANCE


def trained_wrongly(config: dict[str, Any], mistake: str) -> None:
    """Train with DistributedDataParallel and a small mistake in what it does with gradients."""
    from torch.nn.parallel import DistributedDataParallel

    from runtime.objective import starting_gradient
    from runtime.strategies.mixed_precision import wrapped_module

    def wrap_without_one(accelerator: Any, module: Any) -> Any:
        name = "model.final_norm.bias"
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, [name])
        return wrapped_module(accelerator, module)

    with pytest.MonkeyPatch.context() as patch:
        if mistake == "scaled by 1.001":
            scaled = partial(starting_gradient, scale=1.001)
            patch.setattr("runtime.strategies.ddp.starting_gradient", scaled)
        else:
            patch.setattr("runtime.strategies.ddp.wrapped_module", wrap_without_one)
        observe(config)


@pytest.mark.parametrize(
    ("mistake", "seen"), [("scaled by 1.001", "held="), ("one parameter not reduced", r"final_norm\.bias")]
)
def test_a_small_mistake_with_gradients_would_be_caught(
    pool: ProcessPool, tmp_path: Path, mistake: str, seen: str
) -> None:
    changes = {"limit": {"steps": 6}, "optimizer": {"target": "AdamW", "args": {"lr": 0.01}}}
    pool.run(observe, 2, gpt(tmp_path / "right", **changes))
    with pytest.raises(
        (AssertionError, RemoteError), match=seen
    ):  # the run itself sees ranks that hold different weights
        pool.run(trained_wrongly, 2, gpt(tmp_path / "wrong", **changes), mistake)
        assert_saved_alike(tmp_path / "right", tmp_path / "wrong")


@THIRD_STAGE
def test_a_run_stopped_within_an_epoch_goes_on_bit_for_bit(pool: ProcessPool, tmp_path: Path, stage: int) -> None:
    changes = {"strategy": zero(stage), "averaging": {"decay": 0.9}, "limit": {"steps": 8}}
    pool.run(observe, 2, gpt(tmp_path / "whole", **changes))
    pool.run(observe_stopping, 2, gpt(tmp_path / "stopped", **changes), 3)
    assert saved(tmp_path / "stopped")[1]["progress"]["step"] == 3
    pool.run(observe, 2, gpt(tmp_path / "stopped", **changes))
    assert set(differences(tmp_path / "whole", tmp_path / "stopped").values()) == {0.0}


WAYS = {
    "2 to 1": (2, True, 1, True),
    "1 to 2": (1, True, 2, True),
    "ddp to zero": (2, False, 2, True),
    "zero to ddp": (2, True, 1, False),
}


@THIRD_STAGE
@pytest.mark.parametrize("way", WAYS)
def test_a_run_goes_on_with_another_world_size_and_from_and_to_ddp(
    pool: ProcessPool, tmp_path: Path, stage: int, way: str
) -> None:
    first, sharded_first, then, sharded_then = WAYS[way]
    changes = {"averaging": {"decay": 0.9}, "limit": {"steps": 8}}
    pool.run(observe, 1, gpt(tmp_path / "whole", **changes))

    def part(sharded: bool) -> dict[str, Any]:
        return gpt(tmp_path / "moved", **changes, strategy=zero(stage) if sharded else {})

    pool.run(observe_stopping, first, part(sharded_first), 3)
    pool.run(observe, then, part(sharded_then))
    assert_saved_alike(tmp_path / "whole", tmp_path / "moved")


@STAGES
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=LONG)])
def test_a_gradient_that_is_not_finite_leaves_everything_as_it_was(
    pool: ProcessPool, tmp_path: Path, stage: int, precision: str
) -> None:
    changes = {
        "model": {"target": "tiny:Deep", "args": {"dropout": 0.0, "layers": 1}},
        "data": {"train": {"target": "tiny:points", "args": {"dtype": "float32"}}},
        "objective": {"target": "tiny_divergence:Astray"},  # the third batch
        "optimizer": {"target": "AdamW", "args": {"lr": 0.01}},
        "divergence": {"non_finite": "skip"},
        "strategy": zero(stage),
        "precision": precision,
        "checkpoint": {"every": "1 step", "keep": 9},
        "limit": {"steps": 4},
    }
    pool.run(observe, 2, configuration(tmp_path, **changes))
    from runtime.checkpoints.load import load_state

    second, third, fourth = (load_state(tmp_path / "checkpoints" / f"step-0000000{n}") for n in (2, 3, 4))
    assert third[1]["progress"]["skipped_steps"] == [3]
    assert third[1]["progress"]["updates"] == 2
    assert largest(second[0], third[0]) == 0.0
    for number, entry in second[1]["optimizer"]["state"].items():
        assert largest(entry, third[1]["optimizer"]["state"][number]) == 0.0
    assert fourth[1]["progress"]["updates"] == 3
    assert 0.0 < largest(third[0], fourth[0]) < 0.1


def stopped(config: dict[str, Any]) -> str:
    try:
        observe(config)
    except (DivergenceError, ConfigurationError) as error:
        return str(error)
    return "trained"


def test_a_gradient_that_is_not_finite_stops_every_rank_where_that_is_the_policy(
    pool: ProcessPool, tmp_path: Path
) -> None:
    config = gpt(tmp_path, strategy=zero(2), objective={"target": "tiny_losses:Infinite"})
    assert all("NaN or infinite" in message for message in pool.run(stopped, 2, config))


@pytest.mark.parametrize(
    ("stage", "offload"),
    [
        pytest.param(1, {}, marks=LONG),
        pytest.param(2, {}, marks=LONG),
        (3, {}),
        pytest.param(2, {"offload_optimizer": "cpu"}, marks=LONG),
        pytest.param(3, {"offload_optimizer": "cpu"}, marks=LONG),
    ],
)
def test_a_loss_that_jumps_is_left_out_and_gone_round_as_with_ddp(
    pool: ProcessPool, tmp_path: Path, stage: int, offload: dict[str, str]
) -> None:
    """The step's gradient is finite, and there already: it must be cleared, and leave no trace."""
    changes = {
        "model": {"target": "tiny:Deep", "args": {"dropout": 0.0, "layers": 1}},
        "data": {"train": {"target": "tiny:points", "args": {"dtype": "float32"}}},
        "objective": {"target": "tiny_divergence:Astray", "args": {"factor": 1000.0, "batch": 4}},
        "optimizer": {"target": "AdamW", "args": {"lr": 0.01}},
        "checkpoint": {"every": "2 steps"},
        "limit": {"steps": 8},
    }
    for policy in ("skip", "rollback"):
        spike = {"divergence": {"spike": {"window": 3, "sigma": 20.0, "policy": policy}}}
        expected, got = tmp_path / policy / "ddp", tmp_path / policy / "zero"
        pool.run(observe, 2, configuration(expected, **changes, **spike))
        pool.run(observe, 2, configuration(got, **changes, **spike, strategy=zero(stage, **offload)))
        (path,) = {path.name for path in (got / "checkpoints").glob("step-00000008*")}
        assert (expected / "checkpoints" / path).is_dir()
        models = [
            torch.cat([value.flatten() for value in load_model(folder / "checkpoints" / path).values()])
            for folder in (expected, got)
        ]
        assert (models[0] - models[1]).abs().max() < WEIGHTS


def load_model(path: Path) -> dict[str, Any]:
    from runtime.checkpoints.load import load_state

    return load_state(path)[0]


@THIRD_STAGE
def test_bf16_trains_close_to_fp32_and_saves_the_float32_weights(
    pool: ProcessPool, tmp_path: Path, reference: tuple[Path, dict[str, Any]], stage: int
) -> None:
    got = pool.run(observe, 2, gpt(tmp_path, strategy=zero(stage), precision="bf16"))[0]
    assert got["losses"] != reference[1]["losses"]
    assert relative(reference[1]["losses"], got["losses"]) < 0.02
    model = saved(tmp_path)[0]
    assert {value.dtype for value in model.values()} == {torch.float32}
    assert any((value != value.bfloat16().float()).any() for value in model.values())


@THIRD_STAGE
def test_the_average_and_uneven_evaluations_are_ddps(pool: ProcessPool, tmp_path: Path, stage: int) -> None:
    """Five microbatches on two ranks, then one: where forward passes gather parameters, every rank runs as many."""
    validation = {"target": "tiny:tokens", "args": {"size": 9}}
    changes = {
        "averaging": {"decay": 0.8, "start": "2 steps"},
        "limit": {"steps": 6},
        "evaluation": {"every": "3 steps", "micro_size": 2},
    }
    config = gpt(tmp_path / "ddp", **changes)
    config["data"]["validation"] = validation
    expected = pool.run(observe, 2, config)[0]
    config = {**config, "output": str(tmp_path / "zero"), "strategy": zero(stage)}
    ranks = pool.run(observe, 2, config)
    assert ranks[0]["results"] == ranks[1]["results"]
    assert ranks[0]["results"]["loss"] == pytest.approx(expected["results"]["loss"], rel=TOLERANCE)
    assert_saved_alike(tmp_path / "ddp", tmp_path / "zero")
    assert saved(tmp_path / "zero")[1]["averaging"]["count"] > 0


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=LONG)])
def test_offloading_to_the_host_changes_nothing(
    pool: ProcessPool, tmp_path: Path, reference: tuple[Path, dict[str, Any]], stage: int
) -> None:
    offload = {"offload_optimizer": "cpu", **({"offload_parameters": "cpu"} if stage == 3 else {})}
    got = pool.run(observe, 2, gpt(tmp_path, strategy=zero(stage, **offload)))[0]
    assert relative(reference[1]["losses"], got["losses"]) < TOLERANCE
    assert_saved_alike(reference[0], tmp_path)


@pytest.mark.long
def test_frozen_weights_stay_and_are_saved_unrounded(pool: ProcessPool, tmp_path: Path) -> None:
    model = {**gpt(tmp_path)["model"], "freeze": ["token_embedding.*"]}
    for stage in (2, 3):
        for steps in (1, 3):
            config = gpt(tmp_path / str(stage), model=model, precision="bf16", strategy=zero(stage))
            pool.run(observe, 2, {**config, "limit": {"steps": steps}})
        name = "token_embedding.weight"
        first, last = (load_model(tmp_path / str(stage) / "checkpoints" / f"step-0000000{n}") for n in (1, 3))
        assert torch.equal(first[name], last[name])
        assert (last[name] != last[name].bfloat16().float()).any()
        assert not torch.equal(first["final_norm.weight"], last["final_norm.weight"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": {"target": "tiny:Deep", "args": {"dtype": "float64"}}}, "float32 only"),
        (
            {"optimizer": {"target": "schedulefree:AdamWScheduleFree", "args": {"lr": 0.01}}},
            "other weights for evaluation",
        ),
        ({"precision": "fp16"}, "no fp16 on CPUs"),
        (
            {"strategy": zero(3, offload_parameters={"device": "nvme", "path": "/x"})},
            "strategy.zero.offload_parameters: nvme is for GPUs",
        ),
    ],
)
def test_what_cannot_be_sharded_is_refused_with_the_reason(
    pool: ProcessPool, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    points = {"train": {"target": "tiny:points", "args": {"dtype": "float32"}}}
    model = {"target": "tiny:Deep", "args": {}}
    config = configuration(tmp_path, **{"model": model, "data": points, "strategy": zero(2), **changes})
    for message in pool.run(stopped, 2, config):
        assert said in message
        assert "\n" not in message


def elementwise(name: str, **args: Any) -> str | None:
    from runtime.strategies.zero.optimizers import unshardable

    parameters = [torch.nn.Parameter(torch.randn(3, 4))]
    return unshardable(getattr(torch.optim, name)(parameters, **{"lr": 0.01, **args}))


SHARDED = ("Adadelta", "Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD")


@pytest.mark.single
def test_every_optimizer_of_torch_is_sharded_or_refused() -> None:
    for name in SHARDED:
        assert elementwise(name) is None, name
    assert "elementwise" not in (elementwise("Adagrad") or "")
    assert "recreates Adagrad" in str(elementwise("Adagrad"))
    for name in ("Muon", "Adafactor"):
        assert "is not elementwise" in str(elementwise(name)), name
    optimizers = {name for name, kind in vars(torch.optim).items() if isinstance(kind, type)}
    known = {
        *SHARDED,
        "Adagrad",
        "Muon",
        "Adafactor",
        "Optimizer",
        "LBFGS",
        "SparseAdam",
    }  # the last two no strategy takes
    assert optimizers - known == set()


@pytest.mark.long
@pytest.mark.parametrize("name", SHARDED)
def test_every_sharded_optimizer_trains_what_it_trains_with_ddp(pool: ProcessPool, tmp_path: Path, name: str) -> None:
    changes: dict[str, Any] = {
        "optimizer": {"target": name, "args": {"lr": 1e-3}, "max_grad_norm": 1.0},
        "limit": {"steps": 6},
    }
    if name == "SGD":
        changes["optimizer"]["args"]["momentum"] = 0.9
    pool.run(observe, 2, gpt(tmp_path / "ddp", **changes))
    for stage in (1, 2, 3):
        folder = tmp_path / str(stage)
        pool.run(observe_stopping, 2, gpt(folder, **changes, strategy=zero(stage)), 3)
        pool.run(observe, 2, gpt(folder, **changes, strategy=zero(stage)))
        assert_saved_alike(tmp_path / "ddp", folder)


@pytest.mark.single
def test_the_backend_is_named_in_its_own_files_only() -> None:
    allowed = {
        f"runtime/{name}.py"
        for name in (
            *(f"config/{name}" for name in ("zero", "zero_json", "zero_rules", "launcher", "launcher_table")),
            "checks/traces",  # as a library whose objects are not the user's
            "environment",  # as a launcher, like the next one
            "distributed/launcher_watch",
        )
    }
    for folder in ("runtime", "launch"):
        for path in (ROOT / folder).rglob("*.py"):
            name = str(path.relative_to(ROOT))
            if name not in allowed and not name.startswith("runtime/strategies/zero"):
                lines = path.read_text().splitlines()
                assert not [line for line in lines if re.search("deepspeed", line, re.I) and '"""' not in line], name


def test_metrics_are_reported_as_with_ddp(
    pool: ProcessPool, tmp_path: Path, reference: tuple[Path, dict[str, Any]]
) -> None:
    pool.run(observe, 2, gpt(tmp_path, strategy=zero(3), limit={"steps": 1}))
    start, *_ = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    expected, *_ = [json.loads(line) for line in (reference[0] / "metrics.jsonl").read_text().splitlines()]
    assert start["model"] == expected["model"] == "6,960 parameters"


def linear_after(config: dict[str, Any]) -> bool:
    before = torch.nn.functional.linear
    observe(config)
    return torch.nn.functional.linear is before


def test_what_stage_3_puts_in_place_of_torchs_ends_with_the_run(pool: ProcessPool, tmp_path: Path) -> None:
    assert pool.run(linear_after, 2, gpt(tmp_path, strategy=zero(3), limit={"steps": 1})) == [True, True]


def hooked(config: dict[str, Any]) -> tuple[int, set[str]]:
    """Train, and return how many optimizers a user's hooks for all optimizers saw, and which hooks were called."""
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

    seen: dict[int, Any] = {}
    called = set()

    def hook(name: str) -> Any:
        def noting(optimizer: Any, *_: Any) -> None:
            seen[id(optimizer)] = optimizer
            called.add(name)

        return noting

    hooks = [register_optimizer_step_pre_hook(hook("before")), register_optimizer_step_post_hook(hook("after"))]
    try:
        observe(config)
    finally:
        for each in hooks:
            each.remove()
    return len(seen), called


def test_hooks_of_the_users_see_the_runs_optimizer_and_none_that_is_tried_out(
    pool: ProcessPool, tmp_path: Path
) -> None:
    found = pool.run(hooked, 2, gpt(tmp_path, strategy=zero(2), limit={"steps": 2}))
    assert found == [(1, {"before", "after"})] * 2


def bytes_of_what_is_saved(config: dict[str, Any]) -> int:
    """Train, and return the most that this rank held of a state that is saved."""
    from runtime.checkpoints.run_state import RunState
    from runtime.checkpoints.serialization import split_state

    collect, held = RunState.collect, []

    def noting(self: Any) -> dict[str, dict[str, Any]]:
        state = collect(self)
        held.append(sum(tensor.nbytes for tensor in split_state(state)[1].values() if not tensor.is_meta))
        return state

    RunState.collect = noting  # type: ignore[method-assign]
    try:
        observe(config)
    finally:
        RunState.collect = collect  # type: ignore[method-assign]
    return max(held)


@THIRD_STAGE
def test_rank_0_alone_holds_the_whole_state_when_it_is_saved(pool: ProcessPool, tmp_path: Path, stage: int) -> None:
    config = gpt(tmp_path, strategy=zero(stage), averaging={"kind": "ema", "decay": 0.9}, limit={"steps": 2})
    whole, nothing = pool.run(bytes_of_what_is_saved, 2, config)
    model = sum(tensor.nbytes for tensor in saved(tmp_path)[0].values())
    assert whole > 4 * model * 0.99  # weights, two moments, an average
    assert nothing < 0.01 * model


def moves_of_the_whole_module(config: dict[str, Any]) -> int:
    from runtime.objective import TrainingModule

    moves, move = [], TrainingModule.to

    def noting(self: Any, *args: Any, **kwargs: Any) -> Any:
        moves.append(args)
        return move(self, *args, **kwargs)

    TrainingModule.to = noting  # type: ignore[method-assign]
    try:
        observe(config)
    finally:
        TrainingModule.to = move  # type: ignore[method-assign]
    return len(moves)


@pytest.mark.parametrize(("stage", "moved"), [pytest.param(2, True, marks=LONG), (3, False)])
def test_stage_3_never_moves_the_whole_model_to_a_device(
    pool: ProcessPool, tmp_path: Path, stage: int, moved: bool
) -> None:
    moves = pool.run(moves_of_the_whole_module, 2, gpt(tmp_path, strategy=zero(stage), limit={"steps": 1}))
    assert [count > 0 for count in moves] == [moved] * 2


def overflowing(config: dict[str, Any]) -> dict[str, Any]:
    """Train in fp16 on the CPU, which DeepSpeed and so Lockstep refuse: DeepSpeed's loss scale is the same anywhere."""
    from deepspeed.accelerator import get_accelerator

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: True)
        patch.setattr("runtime.strategies.zero.strategy.check_machine", lambda json, *, on_cpu: None)
        return observe(config)


@pytest.mark.long
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_fp16_skips_what_overflows_and_goes_on_bit_for_bit(pool: ProcessPool, tmp_path: Path, stage: int) -> None:
    """DeepSpeed adds up slots and ranks in half precision, so a step may overflow that does not with ddp, never the reverse."""
    from tests.test_strategies import force_overflow

    changes = {"precision": "fp16", "limit": {"steps": 8}}
    pool.run(force_overflow, 2, gpt(tmp_path / "ddp", **changes), 2.0**20)
    scale = {"fp16": {"initial_scale_power": 20, "loss_scale_window": 3, "hysteresis": 1}}
    changes["strategy"] = zero(stage, extra={**PERSISTENT_NONE, **scale})
    ranks = pool.run(overflowing, 2, gpt(tmp_path / "whole", **changes))
    expected, got = saved(tmp_path / "ddp")[1], saved(tmp_path / "whole")[1]
    skipped, of_ddp = got["progress"]["skipped_steps"], expected["progress"]["skipped_steps"]
    assert 2 <= len(skipped) < 8
    assert skipped[:2] == of_ddp[:2]
    # Until the first difference the loss scales are equal too.
    differing = [(ours, theirs) for ours, theirs in zip_longest(skipped, of_ddp, fillvalue=9) if ours != theirs]
    assert all(ours < theirs for ours, theirs in differing[:1])
    assert got["progress"]["updates"] == 8 - len(skipped)
    others = {"skipped_steps": [], "updates": 0}
    assert {**got["progress"], **others} == {**expected["progress"], **others}
    # DeepSpeed raises the scale after three good steps only when the fourth has come.
    good = [after - before - 1 for before, after in pairwise([0, *skipped, 9])]
    raised = sum(max(0, steps - 1) // 3 for steps in good)
    assert got["strategy"]["zero_scaler"]["cur_scale"] == 2.0 ** (20 - len(skipped) + raised)
    assert ranks[0]["losses"] == ranks[1]["losses"]
    for steps in (2, 8):
        pool.run(overflowing, 2, gpt(tmp_path / "resumed", **{**changes, "limit": {"steps": steps}}))
    assert set(differences(tmp_path / "whole", tmp_path / "resumed").values()) == {0.0}
    assert saved(tmp_path / "resumed")[1]["strategy"] == got["strategy"]


def test_stage_3_in_half_precision_goes_on_after_a_step_that_was_not_applied(pool: ProcessPool, tmp_path: Path) -> None:
    """With DeepSpeed's own settings all of so small a model stays whole, and this model reads a weight of another module.

    The checks of a first start make a step that is not applied, and the losses of some steps are infinite.
    """
    changes = {"precision": "bf16", "limit": {"steps": 5}, "divergence": {"non_finite": "skip"}}
    config = gpt(tmp_path / "run", strategy=zero(3, extra={}), **changes)
    config["objective"] = {"target": "tiny_divergence:AstrayWords"}
    pool.run(observe, 2, config)
    model, training = saved(tmp_path / "run")
    assert training["progress"]["updates"] + len(training["progress"]["skipped_steps"]) == 5
    assert training["progress"]["skipped_steps"]
    assert all(bool(weight.isfinite().all()) for weight in model.values())


@pytest.mark.long
@pytest.mark.parametrize("stage", [1, 2])
def test_compiled_blocks_train_what_they_train_uncompiled(pool: ProcessPool, tmp_path: Path, stage: int) -> None:
    from tests.test_fsdp import observe_compiled

    model = gpt(tmp_path)["model"]
    model = {**model, "args": {**model["args"], "dropout": 0.0}}
    changes = {"strategy": zero(stage), "limit": {"steps": 6}, "model": model}
    plain = pool.run(observe, 2, gpt(tmp_path / "plain", **changes))[0]
    compiled = {"backend": "aot_eager", "blocks": ["FeedForward"]}
    got = pool.run(observe_compiled, 2, gpt(tmp_path / "compiled", **changes, compile=compiled))[0]
    assert relative(plain["losses"], got["losses"]) < 1e-5
    assert_saved_alike(tmp_path / "plain", tmp_path / "compiled")
