"""Data parallelism through Accelerate: what is sent, half precision, DDP's options."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from runtime.errors import ConfigurationError, DivergenceError
from runtime.strategies.finite import all_finite
from tests.observed import assert_bitwise_equal, configuration, largest_difference, observe
from tests.process_pool import ProcessPool


def deep(folder: Path, **changes: Any) -> dict[str, Any]:
    return configuration(
        folder,
        **{
            "model": {"target": "tiny:Deep", "args": {"dropout": 0.0}},
            "data": {"train": {"target": "tiny:points", "args": {"dtype": "float32"}}},
            "strategy": {"ddp": {"bucket_mb": 0.01}},
            **changes,
        },
    )


def count_traffic(config: dict[str, Any]) -> dict[str, Any]:
    """Train one reporting-free run; count gradient buckets through a communication hook, and other collectives."""
    from runtime.distributed import collectives
    from runtime.strategies.ddp import DDPStrategy

    buckets: list[int] = []
    others: list[int] = []
    prepare, warm_up, all_reduce = DDPStrategy.prepare, DDPStrategy.warm_up, dist.all_reduce
    seconds_between, collectives._SECONDS_BETWEEN = collectives._SECONDS_BETWEEN, 0.0  # a stop message at every step
    steps_ahead = collectives.StopConsensus.steps_ahead
    collectives.StopConsensus.steps_ahead = property(lambda self: 8)  # type: ignore[assignment, method-assign]  # not by the clock

    def hook(state: Any, bucket: Any) -> Any:
        buckets.append(bucket.buffer().nbytes)
        tensor = bucket.buffer() / dist.get_world_size()
        return dist.all_reduce(tensor, async_op=True).get_future().then(lambda done: done.value()[0])

    hook.__annotations__.clear()  # DDP wants the classes, not their names

    def hooked(self: Any, module: Any, optimizer: Any, *, slots: int) -> None:
        prepare(self, module, optimizer, slots=slots)
        self._wrapped.register_comm_hook(None, hook)

    def warmed(self: Any, filler: Any) -> None:
        warm_up(self, filler)
        buckets.clear()
        others.clear()

    def counted(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        others.append(tensor.nbytes)
        return all_reduce(tensor, *args, **kwargs)

    DDPStrategy.prepare, DDPStrategy.warm_up, dist.all_reduce = hooked, warmed, counted  # type: ignore[method-assign]
    try:
        observe(config)
    finally:
        DDPStrategy.prepare, DDPStrategy.warm_up, dist.all_reduce = prepare, warm_up, all_reduce  # type: ignore[method-assign]
        collectives._SECONDS_BETWEEN = seconds_between
        collectives.StopConsensus.steps_ahead = steps_ahead  # type: ignore[method-assign]
    gradients = list(buckets)
    for size in gradients:  # the hook's own all-reduces
        others.remove(size)
    return {"gradients": gradients, "others": others}


def test_accumulation_sends_gradients_once_per_step_and_one_small_message_beside_them(
    pool: ProcessPool, tmp_path: Path
) -> None:
    sent = {}
    for accumulation in (1, 4):
        config = deep(
            tmp_path / str(accumulation), batch={"global_size": 16, "slots": 2 * accumulation}, limit={"steps": 3}
        )
        config["reporting"]["every"] = "100 steps"
        sent[accumulation] = pool.run(count_traffic, 2, config)[0]
    assert sent[4]["gradients"] == sent[1]["gradients"]
    assert len(sent[1]["gradients"]) >= 3 * 3  # three steps of at least three buckets
    parameters = 8 * 40 + 40 + 5 * (40 * 40 + 40) + 40 * 3 + 3
    assert sum(sent[4]["gradients"]) == 3 * 4 * parameters
    small = [size for size in sent[4]["others"] if size <= 32]
    assert len(small) == 3
    # The weights of eight steps travel in one message; the save at the end compares each of 14 parameters by two numbers.
    assert [size for size in sent[4]["others"] if size > 32] == [3 * 8 * 8, 14 * 2 * 8]


@pytest.mark.single
def test_one_process_sends_nothing(pool: ProcessPool, tmp_path: Path) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a collective was called")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_reduce", "all_gather", "broadcast", "barrier"):
            patch.setattr(dist, name, refuse)
        observe(deep(tmp_path, limit={"steps": 2}))


def force_overflow(config: dict[str, Any], scale: float) -> dict[str, Any]:
    """Train with an initial loss scale under which the first gradients overflow float16."""
    from torch.amp import GradScaler

    initial = GradScaler.__init__

    def start_high(self: Any, device: str = "cuda", **kwargs: Any) -> None:
        initial(self, device, init_scale=scale, growth_interval=3)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GradScaler, "__init__", start_high)
        return observe(config)


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.single), 2])
def test_fp16_skips_overflows_without_a_trace_and_resumes_bitwise(
    pool: ProcessPool, tmp_path: Path, world_size: int
) -> None:
    changes = {
        "precision": "fp16",
        "optimizer": {"target": "AdamW", "args": {"lr": 0.01}, "max_grad_norm": 1.0},
        "schedule": {"target": "ExponentialLR", "args": {"gamma": 0.5}},
        "limit": {"steps": 8},
    }
    whole = pool.run(force_overflow, world_size, deep(tmp_path / "whole", **changes), 2.0**20)[0]
    state = saved(tmp_path / "whole", 8)
    skipped = state["progress"]["skipped_steps"]
    assert skipped[0] == 1
    assert 2 <= len(skipped) < 8
    assert state["progress"]["updates"] == 8 - len(skipped)
    assert state["schedule"]["updates"] == 8 - len(skipped)
    assert state["strategy"]["scaler"]["scale"] < 2.0**20

    config = deep(tmp_path / "resumed", **changes)
    pool.run(force_overflow, world_size, {**config, "limit": {"steps": 2}}, 2.0**20)  # stopped amid the overflows
    pool.run(force_overflow, world_size, {**config, "limit": {"steps": 6}}, 7.0)
    resumed = pool.run(force_overflow, world_size, config, 7.0)[0]  # the stored scale counts, not the initial one
    assert_bitwise_equal(whole, resumed)
    assert saved(tmp_path / "resumed", 8)["strategy"] == state["strategy"]


@pytest.mark.single
def test_skipped_steps_leave_weights_and_averages_and_buffers_as_they_are(pool: ProcessPool, tmp_path: Path) -> None:
    changes = {
        "model": {"target": "tiny:Mlp", "args": {"dtype": "float32"}},
        "precision": "fp16",
        "averaging": {"decay": 0.5},
        "limit": {"steps": 1},
    }
    pool.run(force_overflow, 1, deep(tmp_path / "one", **changes), 2.0**80)
    changes["limit"] = {"steps": 3}
    pool.run(force_overflow, 1, deep(tmp_path / "three", **changes), 2.0**80)
    one, three = saved(tmp_path / "one", 1), saved(tmp_path / "three", 3)
    assert three["progress"]["skipped_steps"] == [1, 2, 3]
    assert one["averaging"]["count"] == three["averaging"]["count"] == 0
    for name, value in one["averaging"]["average"].items():
        assert torch.equal(value, three["averaging"]["average"][name])
    for name, value in saved_model(tmp_path / "one", 1).items():
        assert torch.equal(value, saved_model(tmp_path / "three", 3)[name]), name


@pytest.mark.single
def test_a_loss_that_is_never_finite_ends_the_search_for_a_scale(tmp_path: Path) -> None:
    config = deep(tmp_path, precision="fp16", objective="tiny_losses:Infinite", limit={"steps": 200})
    with pytest.raises(DivergenceError, match="loss scale"):
        observe(config)


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.single), 2])
def test_bf16_trains_close_to_fp32_and_keeps_fp32_weights(pool: ProcessPool, tmp_path: Path, world_size: int) -> None:
    full = pool.run(observe, world_size, deep(tmp_path / "fp32"))[0]
    half = pool.run(observe, world_size, deep(tmp_path / "bf16", precision="bf16"))[0]
    assert half["losses"] != full["losses"]
    for step, loss in full["losses"].items():
        assert half["losses"][step] == pytest.approx(loss, rel=0.03)
    assert all(value.dtype == "float32" for value in half["weights"].values())


@pytest.mark.parametrize(
    "options",
    [
        {"static_graph": True},
        {"find_unused_parameters": True},
        {"gradient_as_bucket_view": False},
        {"bucket_mb": 0.02},
    ],
)
def test_ddp_options_change_no_result(pool: ProcessPool, tmp_path: Path, options: dict[str, Any]) -> None:
    changes = {
        "model": {"target": "tiny:Deep", "args": {"dtype": "float64"}},
        "data": {"train": {"target": "tiny:points"}},
    }
    alone = pool.run(observe, 1, deep(tmp_path / "alone", **changes))[0]
    config = deep(tmp_path / "shared", **changes, strategy={"ddp": options})
    assert largest_difference(alone, pool.run(observe, 2, config)[0]) < 1e-10


def test_the_fp16_communication_hook_is_really_used(pool: ProcessPool, tmp_path: Path) -> None:
    exact = pool.run(observe, 2, deep(tmp_path / "exact"))[0]
    config = deep(tmp_path / "hooked", strategy={"ddp": {"communication_hook": "fp16"}})
    hooked = pool.run(observe, 2, config)[0]
    assert 1e-7 < largest_difference(exact, hooked) < 1e-2


def test_the_bf16_communication_hook_is_refused_where_gloo_cannot_reduce_it(pool: ProcessPool, tmp_path: Path) -> None:
    config = deep(tmp_path, strategy={"ddp": {"communication_hook": "bf16"}})
    assert pool.run(refused, 2, config) == ["ConfigurationError"] * 2


def refused(config: dict[str, Any]) -> str:
    try:
        observe(config)
    except ConfigurationError as error:
        assert "gloo" in str(error)
        assert not dist.is_initialized()  # the next run in this process may be of another world
        return type(error).__name__
    return "trained"


def test_a_non_finite_gradient_stops_every_rank_before_the_update(pool: ProcessPool, tmp_path: Path) -> None:
    config = deep(tmp_path, objective="tiny_losses:InfiniteInThirdStep", limit={"steps": 9})
    config["checkpoint"]["every"] = "1 step"
    replies = pool.run(not_finite, 2, config)
    assert all("step 3 (epoch 1, batch 3)" in reply for reply in replies)
    expected = observe(deep(tmp_path / "two", objective="tiny_losses:InfiniteInThirdStep", limit={"steps": 2}))
    newest = saved_model(tmp_path, 2)
    assert not (tmp_path / "checkpoints" / "step-00000003").exists()
    assert all(abs(newest[name].numpy() - value).max() < 1e-6 for name, value in expected["weights"].items())


def not_finite(config: dict[str, Any]) -> str:
    try:
        observe(config)
    except DivergenceError as error:
        return str(error)
    return "trained"


def test_compiled_models_give_the_same_losses(tmp_path: Path) -> None:
    eager = observe(deep(tmp_path / "eager"))
    compiled = observe(deep(tmp_path / "compiled", compile={"backend": "aot_eager"}))
    assert compiled["losses"] == pytest.approx(eager["losses"], rel=1e-5)


def saved(folder: Path, step: int) -> dict[str, Any]:
    from runtime.checkpoints.load import load_state

    return load_state(folder / "checkpoints" / f"step-{step:08d}")[1]


def saved_model(folder: Path, step: int) -> dict[str, Any]:
    from runtime.checkpoints.load import load_state

    return load_state(folder / "checkpoints" / f"step-{step:08d}")[0]


@pytest.mark.single
@pytest.mark.parametrize("where", [0, 3, -1])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_element_that_is_not_finite_is_found_and_finite_gradients_are_left_bit_for_bit(
    where: int, value: float
) -> None:
    gradients = [torch.randn(5), torch.full((2, 3), 3e38), torch.full((4,), 1e-45)]  # a sum that overflows
    before = [gradient.clone() for gradient in gradients]
    assert all_finite(gradients)
    assert all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in zip(gradients, before, strict=True))
    gradients[1].view(-1)[where] = value
    assert not all_finite(gradients)


@pytest.mark.single
def test_the_norm_is_reported_though_it_is_measured_for_reports_alone(tmp_path: Path) -> None:
    every = observe(deep(tmp_path / "every"))
    config = deep(tmp_path / "some")
    config["reporting"]["every"] = "2 steps"
    some = observe(config)
    assert some["norms"] == {step: norm for step, norm in every["norms"].items() if step in (2, 4, 5)}
    assert_bitwise_equal(every, some)


@pytest.mark.single
@pytest.mark.parametrize("every", ["1 step", "5 steps"])
def test_how_often_is_reported_does_not_decide_whether_a_step_is_applied(tmp_path: Path, every: str) -> None:
    """The gradients are finite in float32, their norm is not."""
    config = deep(tmp_path, objective="tiny_losses:Huge", optimizer={"target": "SGD", "args": {"lr": 1e-35}})
    config["reporting"]["every"] = every
    assert observe(config)["step"] == 5
    assert saved(tmp_path, 5)["progress"]["updates"] == 5


def test_a_closed_strategy_and_its_model_are_freed_without_a_garbage_collection() -> None:
    """Several runs in one Python process follow one another on one device."""
    from runtime.config.strategy import DDPSection
    from runtime.objective import Objective, TrainingModule
    from runtime.strategies.ddp import DDPStrategy

    strategy = DDPStrategy(precision="fp32", options=DDPSection())
    module = TrainingModule(torch.nn.Linear(2, 2), Objective())
    strategy.prepare_evaluation(module)
    strategy.close()
    left = weakref.ref(strategy), weakref.ref(module)
    gc.disable()
    try:
        del strategy, module
        assert [reference() for reference in left] == [None, None]
    finally:
        gc.enable()
