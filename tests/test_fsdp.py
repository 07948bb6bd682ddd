"""FSDP2: the same answer as DistributedDataParallel, from a part of the state on each rank."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from runtime.checkpoints.inspection import inspect
from runtime.checkpoints.load import damage_of, load_state
from runtime.commands.weights_file import export
from runtime.errors import ConfigurationError
from tests.compared_weights import assert_weights_agree
from tests.observed import assert_bitwise_equal, configuration, largest_difference, observe
from tests.process_pool import ProcessPool
from tests.test_resumption import observe_stopping
from tests.test_strategies import force_overflow


def gpt(folder: Path, kind: str = "fsdp", **changes: Any) -> dict[str, Any]:
    """A GPT in float64 on sentences of very uneven length, some without any target; three slots a rank on two ranks."""
    sharded = {"kind": kind, "fsdp": {"wrap": ["Block"]}}
    return configuration(
        folder,
        **{
            "model": {"target": "tiny_sharded:Gpt", "args": {}},
            "data": {"train": {"target": "tiny_sharded:sentences", "args": {}}},
            "batch": {"global_size": 7, "slots": 5},
            "objective": "CrossEntropyLoss",
            "optimizer": {"target": "AdamW", "args": {"lr": 0.01, "weight_decay": 0.1}, "max_grad_norm": 1.0},
            "limit": {"steps": 20},
            "strategy": sharded if kind == "fsdp" else {"kind": kind},
            **changes,
        },
    )


def test_twenty_steps_of_uneven_masked_microbatches_equal_those_of_ddp(pool: ProcessPool, tmp_path: Path) -> None:
    ddp = pool.run(observe, 2, gpt(tmp_path / "ddp", "ddp"))[0]
    fsdp = pool.run(observe, 2, gpt(tmp_path / "fsdp"))[0]
    assert_alike(tmp_path / "ddp", ddp["weights"], fsdp["weights"])
    assert fsdp["losses"] == pytest.approx(ddp["losses"], rel=1e-10)
    assert fsdp["norms"] == pytest.approx(ddp["norms"], rel=1e-10)


def assert_alike(run: Path, expected: dict[str, Any], got: dict[str, Any]) -> None:
    """Compare the weights of two runs, or their averages, in float64; measured: 3e-13."""
    without_prefix = ({name.removeprefix("model."): value for name, value in each.items()} for each in (expected, got))
    assert_weights_agree(run, *without_prefix, relative=1e-11)


def divide_wrongly(config: dict[str, Any]) -> dict[str, Any]:
    """Train with gradients that are averaged over the ranks instead of summed."""
    from runtime.strategies import fsdp

    sum_gradients = fsdp._sum_gradients
    fsdp._sum_gradients = lambda unit: None
    try:
        return observe(config)
    finally:
        fsdp._sum_gradients = sum_gradients


def test_a_wrong_division_would_be_seen(pool: ProcessPool, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"optimizer": {"target": "SGD", "args": {"lr": 0.1}}, "limit": {"steps": 2}}
    right = pool.run(observe, 2, gpt(tmp_path / "right", **changes))[0]
    wrong = pool.run(divide_wrongly, 2, gpt(tmp_path / "wrong", **changes))[0]
    assert wrong["norms"][1] == pytest.approx(right["norms"][1] / 2)
    assert largest_difference(right, wrong) > 1e-3


@pytest.mark.parametrize(
    ("world_size", "options"),
    [
        pytest.param(1, {"wrap": ["Block"]}, marks=pytest.mark.single),
        (2, {"wrap": ["Block"], "no_sync": True, "reshard_after_forward": False}),
        (2, {"min_parameters": 500, "cpu_offload": True}),
        (2, {}),
        (3, {"wrap": ["Block"]}),  # uneven: 12 rows over 3 ranks, 23 rows over 3
        (4, {"wrap": ["Block"], "replicas": 2}),
    ],
)
def test_no_option_changes_the_answer(
    pool: ProcessPool, tmp_path: Path, world_size: int, options: dict[str, Any]
) -> None:
    changes: dict[str, Any] = {
        "limit": {"steps": 4},
        "averaging": {"decay": 0.5},
        "data": {"train": {"target": "tiny_sharded:sentences"}, "validation": {"target": "tiny_sharded:sentences"}},
        "evaluation": {"every": "2 steps", "micro_size": 13},  # 5 microbatches: no world size divides them evenly
    }
    ddp = pool.run(observe, 1, gpt(tmp_path / "ddp", "ddp", **changes))[0]
    config = gpt(tmp_path / "fsdp", **changes, strategy={"kind": "fsdp", "fsdp": options})
    fsdp = pool.run(observe, world_size, config)[0]
    assert_alike(tmp_path / "ddp", ddp["weights"], fsdp["weights"])
    assert fsdp["results"] == pytest.approx(ddp["results"], rel=1e-10)
    assert_alike(tmp_path / "ddp", averages(tmp_path / "ddp", 4), averages(tmp_path / "fsdp", 4))


def averages(folder: Path, step: int) -> dict[str, torch.Tensor]:
    average: dict[str, torch.Tensor] = load_state(checkpoint(folder, step))[1]["averaging"]["average"]
    return average


def checkpoint(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step-{step:08d}"


def full(folder: Path, **changes: Any) -> dict[str, Any]:
    """Dropout, a warm-up, an average, and steps enough to be in the middle of the second epoch."""
    return gpt(
        folder,
        **{
            "schedule": {"target": "CosineAnnealingLR", "args": {"T_max": 14}, "warmup_steps": 3},
            "averaging": {"decay": 0.9},
            "limit": {"steps": 14},
            **changes,
        },
    )


def test_a_run_stopped_within_an_epoch_goes_on_bit_for_bit(pool: ProcessPool, tmp_path: Path) -> None:
    whole = pool.run(observe, 2, full(tmp_path / "whole"))[0]
    config = full(tmp_path / "resumed")
    assert pool.run(observe_stopping, 2, config, 4)[0]["outcome"] == "stopped"
    resumed = pool.run(observe, 2, config)[0]
    assert_bitwise_equal(whole, resumed)
    assert resumed["losses"] == whole["losses"]
    ours, theirs = averages(tmp_path / "resumed", 14), averages(tmp_path / "whole", 14)
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_a_run_goes_on_with_other_numbers_of_processes_and_as_ddp_and_back(pool: ProcessPool, tmp_path: Path) -> None:
    whole = pool.run(observe, 1, full(tmp_path / "whole", strategy={"kind": "ddp"}))[0]
    ddp, fsdp = {"kind": "ddp"}, {"kind": "fsdp", "fsdp": {"wrap": ["Block"]}}
    replicated = {"kind": "fsdp", "fsdp": {"wrap": ["Block"], "replicas": 2}}
    turns = ((2, fsdp, 2), (1, fsdp, 4), (2, ddp, 6), (2, fsdp, 8), (4, replicated, 10), (1, ddp, 12), (2, fsdp, None))
    for world_size, strategy, after in turns:
        config = full(tmp_path / "turns", strategy=strategy)
        turned = pool.run(observe_stopping, world_size, config, after)[0]
    assert turned["step"] == 14
    assert_alike(tmp_path / "whole", whole["weights"], turned["weights"])
    assert turned["losses"] == pytest.approx(whole["losses"], rel=1e-10)
    assert_alike(tmp_path / "whole", averages(tmp_path / "whole", 14), averages(tmp_path / "turns", 14))


def deep(folder: Path, strategy: dict[str, Any], batch: int, **changes: Any) -> dict[str, Any]:
    """A run one of whose global batches has an infinite loss; of two ranks the second has a filler in every step."""
    return configuration(
        folder,
        **{
            "model": {"target": "tiny:Deep", "args": {"dtype": "float64"}},
            "objective": {"target": "tiny_divergence:Astray", "args": {"batch": batch, "dtype": "float64"}},
            "batch": {"global_size": 16, "slots": 5},
            "divergence": {"non_finite": "skip"},
            "averaging": {"decay": 0.5},
            "limit": {"steps": 6},
            "strategy": strategy,
            **changes,
        },
    )


@pytest.mark.parametrize("batch", [0, 2])  # the first is what fillers are made of
def test_an_infinite_gradient_is_skipped_alike_and_fillers_of_an_infinite_loss_leave_no_trace(
    pool: ProcessPool, tmp_path: Path, batch: int
) -> None:
    ddp = pool.run(observe, 1, deep(tmp_path / "ddp", {"kind": "ddp"}, batch))[0]
    sharded = {"kind": "fsdp", "fsdp": {"min_parameters": 5000}}
    fsdp = pool.run(observe, 2, deep(tmp_path / "fsdp", sharded, batch))[0]
    progress = load_state(checkpoint(tmp_path / "fsdp", 6))[1]["progress"]
    assert progress["skipped_steps"] == [batch + 1]
    assert progress["updates"] == 5
    assert largest_difference(ddp, fsdp) < 1e-10


def test_a_damaged_shard_is_passed_over_and_an_export_is_whole(pool: ProcessPool, tmp_path: Path) -> None:
    config = full(tmp_path, limit={"steps": 4}, checkpoint={"every": "2 steps"})
    whole = pool.run(observe, 2, config)[0]
    newest = checkpoint(tmp_path, 4)
    files = {path.name for path in newest.iterdir()}
    parts = {f"{part}-0000{rank}-of-00002.safetensors" for part in ("model", "training") for rank in (0, 1)}
    assert files == parts | {"shards.json", "state.json", "manifest.json"}
    assert all(tensor.numel() for file in parts for tensor in load_file(newest / file).values())
    export(newest, tmp_path / "out.safetensors", warn=print)
    exported = load_file(tmp_path / "out.safetensors")
    assert exported.keys() == whole["weights"].keys()
    assert all(exported[name].numpy().tobytes() == value.tobytes() for name, value in whole["weights"].items())

    spoiled = newest / "training-00001-of-00002.safetensors"
    content = bytearray(spoiled.read_bytes())
    content[-1] ^= 1
    spoiled.write_bytes(content)
    listing = inspect(tmp_path)
    assert [(i.step, i.state) for i in listing.checkpoints] == [(2, "whole"), (4, "damaged")]
    assert "training-00001-of-00002.safetensors does not match" in str(damage_of(newest))
    assert_bitwise_equal(whole, pool.run(observe, 2, config)[0])
    assert inspect(tmp_path).sound


def fail_on_rank_1(config: dict[str, Any]) -> str:
    """Train where the second rank's disk is full."""
    from runtime.checkpoints.serialization import write_tensors
    from runtime.errors import CheckpointError

    def full_disk(path: Path, tensors: Any) -> Any:
        if "-00001-of-" in path.name:
            raise OSError(28, "No space left on device")
        return write_tensors(path, tensors)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("runtime.checkpoints.sharded_files.write_tensors", full_disk)
        try:
            observe(config)
        except CheckpointError as error:
            return str(error)
    return "trained"


def test_a_rank_that_cannot_write_its_part_ends_the_run_on_every_rank(pool: ProcessPool, tmp_path: Path) -> None:
    replies = pool.run(fail_on_rank_1, 2, full(tmp_path, limit={"steps": 3}))
    assert replies == ["rank 1 could not write its part: No space left on device"] * 2
    assert list((tmp_path / "checkpoints").iterdir()) == []


@pytest.mark.parametrize("kind", [pytest.param("ddp", marks=pytest.mark.long), "fsdp"])
def test_recomputed_and_compiled_blocks_change_no_result(pool: ProcessPool, tmp_path: Path, kind: str) -> None:
    plain = pool.run(observe, 2, gpt(tmp_path / "plain", "ddp", limit={"steps": 3}))[0]
    model = {"target": "tiny_sharded:Gpt", "args": {}, "checkpoint_activations": ["Block"]}
    compiled = {"backend": "aot_eager", "blocks": ["FeedForward"]}
    config = gpt(tmp_path / "other", kind, limit={"steps": 3}, model=model, compile=compiled)
    assert_alike(tmp_path / "plain", plain["weights"], pool.run(observe_compiled, 2, config)[0]["weights"])


def observe_compiled(config: dict[str, Any]) -> dict[str, Any]:
    """Train; the compiler looks whether what comes from a block before has a gradient, and warns of itself (torch 2.13)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf", UserWarning)
        return observe(config)


def count_recomputation(config: dict[str, Any]) -> int:
    from runtime.model_zoo.gpt import Attention

    forward, calls = Attention.forward, []

    def counted(self: Any, stream: Any) -> Any:
        calls.append(1)
        return forward(self, stream)

    Attention.forward = counted  # type: ignore[method-assign]
    try:
        observe(config)
    finally:
        Attention.forward = forward  # type: ignore[method-assign]
    return len(calls)


@pytest.mark.single
def test_checkpointed_blocks_run_forward_twice(pool: ProcessPool, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "limit": {"steps": 1},
        "strategy": {"kind": "ddp"},
        "checks": "off",
    }  # which run it as well
    once = pool.run(count_recomputation, 1, gpt(tmp_path / "once", **changes))[0]
    model = {"target": "tiny_sharded:Gpt", "checkpoint_activations": ["Block"]}
    twice = pool.run(count_recomputation, 1, gpt(tmp_path / "twice", **changes, model=model))[0]
    assert (once, twice) == (2 * 5, 2 * 2 * 5)


def test_bf16_gathering_stays_within_its_rounding(pool: ProcessPool, tmp_path: Path) -> None:
    model = {"target": "tiny_sharded:Gpt", "args": {"dtype": "float32"}}
    changes: dict[str, Any] = {"model": model, "precision": "bf16", "limit": {"steps": 8}}
    ddp = pool.run(observe, 2, gpt(tmp_path / "ddp", "ddp", **changes))[0]
    mixed = {"kind": "fsdp", "fsdp": {"wrap": ["Block"], "mixed_precision": {"parameters": "bf16"}}}
    fsdp = pool.run(observe, 2, gpt(tmp_path / "fsdp", **changes, strategy=mixed))[0]
    worst = max(abs(fsdp["losses"][step] / loss - 1) for step, loss in ddp["losses"].items())
    assert 0 < worst < 0.01
    assert all(value.dtype == "float32" for value in fsdp["weights"].values())


def measure_state(config: dict[str, Any]) -> dict[str, int]:
    """Train, and return the bytes that this rank held after the last update."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    from runtime.strategies.fsdp_tensors import local

    found: dict[str, int] = {}

    def measure(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        states = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
        found["parameters"] = sum(local(p).nbytes for p in parameters)
        found["optimizer"] = sum(local(value).nbytes for value in states)

    hook = register_optimizer_step_post_hook(measure)
    try:
        observe(config)
    finally:
        hook.remove()
    return found


@pytest.mark.parametrize("world_size", [2, 4])
def test_each_rank_holds_what_the_formula_says(pool: ProcessPool, tmp_path: Path, world_size: int) -> None:
    held = pool.run(measure_state, world_size, gpt(tmp_path, batch={"global_size": 8, "slots": 4}, limit={"steps": 1}))
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    formula = records[0]["state_bytes"]
    assert max(rank["parameters"] for rank in held) == formula["parameters"]
    assert max(rank["optimizer"] for rank in held) == formula["optimizer"] == 2 * formula["parameters"]
    assert sum(rank["parameters"] for rank in held) == 8 * 4188  # together each value once


@pytest.mark.single
@pytest.mark.parametrize(
    ("changes", "key", "message"),
    [
        ({"batch": {"global_size": 8, "micro_size": "auto"}}, "batch.micro_size", "give a number"),
        ({"strategy": {"kind": "ddp", "fsdp": {"wrap": ["Block"]}}}, "strategy.fsdp", "ignored with kind: ddp"),
        ({"strategy": {"kind": "fsdp", "fsdp": {"wrap": ["Blok"]}}}, "strategy.fsdp.wrap", "did you mean 'Block'"),
        (
            {"strategy": {"kind": "fsdp", "fsdp": {"wrap": ["Block"], "min_parameters": 9}}},
            "strategy.fsdp.min_parameters",
            "not both",
        ),
        ({"strategy": {"kind": "fsdp", "fsdp": {"replicas": 2}}}, "strategy.fsdp.replicas", "2 replicas"),
        ({"optimizer": {"target": "Adafactor", "args": {}}}, "optimizer.target", "rows and columns"),
        ({"compile": {"backend": "aot_eager"}}, "compile.blocks", "give their classes"),
        (
            {"model": {"target": "tiny_sharded:Gpt", "checkpoint_activations": ["Nothing"]}},
            "model.checkpoint_activations",
            "no module of the model is a 'Nothing'",
        ),
        (
            {"strategy": {"kind": "fsdp", "fsdp": {"mixed_precision": {"parameters": "bf16"}}}},
            "strategy.fsdp.mixed_precision.parameters",
            "that of precision",
        ),
        ({"objective": "tiny:PairObjective", "model": "tiny:Encoder"}, "strategy.fsdp.wrap", "shape"),
        (
            {"model": {"target": "tiny_sharded:HalfHead"}},
            "strategy.kind",
            "parameters of one dtype in each sharded block",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_its_key(
    pool: ProcessPool, tmp_path: Path, changes: dict[str, Any], key: str, message: str
) -> None:
    if "objective" in changes:
        changes = {**changes, "data": {"train": {"target": "tiny:points"}}, "strategy": {"kind": "fsdp"}}
    told = pool.run(refused, 1, gpt(tmp_path, **changes))[0]
    assert key in told
    assert message in told


def refused(config: dict[str, Any]) -> str:
    try:
        observe(config)
    except ConfigurationError as error:
        return str(error)
    return "trained"


def written(config: dict[str, Any], output: str) -> None:
    from runtime.session import predict

    predict(config, split="train", output=output)


def evaluated(config: dict[str, Any]) -> dict[str, Any]:
    from runtime.session import evaluate

    return dict(evaluate(config, split="train", weights="averaged").results)


def test_a_checkpoint_is_evaluated_and_predicted_by_ranks_with_uneven_shares(pool: ProcessPool, tmp_path: Path) -> None:
    evaluation = {"every": "1000 steps", "micro_size": 30}  # three microbatches on two ranks; on four, one has none
    config = full(tmp_path / "run", limit={"steps": 2}, evaluation=evaluation)
    pool.run(observe, 2, config)
    alone = {**config, "strategy": {"kind": "ddp"}}
    found = {}
    for name, processes, each in (("one", 1, alone), ("two", 2, config), ("four", 4, config)):
        pool.run(written, processes, each, str(tmp_path / f"{name}.csv"))
        found[name] = pool.run(evaluated, processes, each)[0]
    rows = {name: (tmp_path / f"{name}.csv").read_text().splitlines() for name in found}
    numbers = {name: [[float(n) for n in row.split(",")] for row in lines[1:]] for name, lines in rows.items()}
    assert len(numbers["one"]) == 64
    for name in ("two", "four"):
        assert found[name] == pytest.approx(found["one"], rel=1e-10)
        assert rows[name][0] == rows["one"][0]
        for ours, theirs in zip(numbers[name], numbers["one"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-10)


@pytest.mark.parametrize(
    "optimizer", ["Adagrad", *(pytest.param(name, marks=pytest.mark.long) for name in ("SGD", "NAdam", "RMSprop"))]
)
def test_optimizers_whose_kernels_or_early_state_torch_does_not_shard_give_the_same(
    pool: ProcessPool, tmp_path: Path, optimizer: str
) -> None:
    changes: dict[str, Any] = {
        "optimizer": {"target": optimizer, "args": {"lr": 0.01}, "max_grad_value": 0.01},
        "limit": {"steps": 3},
    }
    ddp = pool.run(observe, 1, gpt(tmp_path / "ddp", "ddp", **changes))[0]
    fsdp = pool.run(observe, 2, gpt(tmp_path / "fsdp", **changes))[0]
    assert_alike(tmp_path / "ddp", ddp["weights"], fsdp["weights"])


def test_frozen_parameters_batch_norm_and_swa_are_those_of_ddp(pool: ProcessPool, tmp_path: Path) -> None:
    data = {"train": {"target": "tiny:points"}, "validation": {"target": "tiny:points", "args": {"size": 31}}}
    changes: dict[str, Any] = {
        "model": {"target": "tiny:Mlp", "args": {}, "freeze": ["net.4.bias"]},
        "data": data,
        "batch": {"global_size": 16, "slots": 5},
        "averaging": {"kind": "swa", "every": "1 step", "start": "1 step"},
        "limit": {"steps": 6},
        "evaluation": {"every": "3 steps"},
    }
    ddp = pool.run(observe, 1, configuration(tmp_path / "ddp", **changes))[0]
    fsdp = pool.run(observe, 2, configuration(tmp_path / "fsdp", **changes, strategy={"kind": "fsdp"}))
    assert largest_difference(ddp, fsdp[0]) < 1e-10
    assert fsdp[0]["results"] == pytest.approx(ddp["results"], rel=1e-10)
    assert fsdp[0]["buffers"] == fsdp[1]["buffers"]
    for name in ("ddp", "fsdp"):
        export(tmp_path / name, tmp_path / f"{name}.safetensors", weights="averaged", warn=print)
    ours, theirs = load_file(tmp_path / "fsdp.safetensors"), load_file(tmp_path / "ddp.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], value, rtol=1e-10, atol=1e-12) for name, value in theirs.items())


def test_fp16_lowers_its_scale_on_all_ranks_alike_and_resumes_bitwise(pool: ProcessPool, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "model": {"target": "tiny_sharded:Gpt", "args": {"dtype": "float32"}},
        "precision": "fp16",
        "limit": {"steps": 8},
    }
    whole = pool.run(force_overflow, 2, gpt(tmp_path / "whole", **changes), 2.0**20)[0]
    state = load_state(checkpoint(tmp_path / "whole", 8))[1]
    skipped = state["progress"]["skipped_steps"]
    assert 2 <= len(skipped) < 8
    assert state["strategy"]["scaler"]["scale"] < 2.0**20
    config = gpt(tmp_path / "resumed", **changes)
    pool.run(force_overflow, 2, {**config, "limit": {"steps": 2}}, 2.0**20)
    assert_bitwise_equal(whole, pool.run(force_overflow, 2, config, 7.0)[0])


@pytest.mark.long
def test_schedule_free_weights_are_saved_and_resumed(pool: ProcessPool, tmp_path: Path) -> None:
    optimizer = {"target": "schedulefree:AdamWScheduleFree", "args": {"lr": 0.01, "foreach": False}}
    changes: dict[str, Any] = {"optimizer": optimizer, "limit": {"steps": 6}}
    ddp = pool.run(observe, 1, gpt(tmp_path / "ddp", "ddp", **changes))[0]
    config = gpt(tmp_path / "fsdp", **changes)
    pool.run(observe_stopping, 2, config, 3)
    assert_alike(tmp_path / "ddp", ddp["weights"], pool.run(observe, 2, config)[0]["weights"])


def test_a_rollback_of_sharded_state_takes_the_way_of_ddp(pool: ProcessPool, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "divergence": {"non_finite": "rollback"},
        "checkpoint": {"every": "1 step"},
        "limit": {"steps": 5},
    }
    ddp = pool.run(observe, 1, deep(tmp_path / "ddp", {"kind": "ddp"}, 2, **changes))[0]
    fsdp = pool.run(observe, 2, deep(tmp_path / "fsdp", {"kind": "fsdp"}, 2, **changes))[0]
    assert largest_difference(ddp, fsdp) < 1e-10


@pytest.mark.single
def test_a_launcher_that_was_told_to_shard_is_refused_where_the_yaml_says_ddp(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigurationError, match="ACCELERATE_USE_FSDP"):
        observe(gpt(tmp_path, "ddp"))


@pytest.mark.long
def test_a_killed_run_goes_on_from_its_shards_bit_for_bit(tmp_path: Path) -> None:
    def command(name: str) -> list[str]:
        config = full(tmp_path / name, limit={"steps": 60}, checkpoint={"every": "3 steps"})
        (tmp_path / f"{name}.yaml").write_text(json.dumps(config))
        return [sys.executable, "-m", "runtime.cli", "train", str(tmp_path / f"{name}.yaml"), "--processes", "2"]

    subprocess.run(command("whole"), check=True, capture_output=True)
    killed = subprocess.Popen(command("killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not any(step > 9 for step in steps_saved(tmp_path / "killed")):
        assert killed.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for process in psutil.Process(killed.pid).children(recursive=True):  # launcher and ranks, in the middle of an epoch
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    assert killed.wait(60) != 0
    assert max(steps_saved(tmp_path / "killed")) < 60
    subprocess.run(command("killed"), check=True, capture_output=True)
    ours, theirs = (load_state(checkpoint(tmp_path / name, 60))[0] for name in ("killed", "whole"))
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def steps_saved(folder: Path) -> list[int]:
    there = (folder / "checkpoints").glob("step-????????")
    return [int(path.name.removeprefix("step-")) for path in there]


def write_whole_tensors_together(folder: Path) -> bool:
    """Let all ranks save a state of which none holds a part alone."""
    import torch.distributed as dist

    from runtime.checkpoints.checkpoint import CheckpointFolder, write_own_shard
    from runtime.checkpoints.snapshot import HostBuffers
    from runtime.checkpoints.writer_group import WriterGroup

    dist.init_process_group("gloo")
    writers = WriterGroup(rank=dist.get_rank(), world_size=dist.get_world_size(), timeout_seconds=10)
    state: dict[str, Any] = {"model": {"weight": torch.arange(3.0)}, "training": {"count": 1}}
    facts: dict[str, Any] = {"step": 1, "attempt": 0, "epoch": 1, "results": {}}
    snapshot = HostBuffers().copy(state, **facts)
    try:
        if writers.rank == 0:
            CheckpointFolder(folder, keep=1, best=[], warn=print).write(snapshot, writers)
        else:
            write_own_shard(snapshot, writers)
        dist.barrier()
        (path,) = folder.glob("step-*")
        return damage_of(path) is None and torch.equal(load_state(path)[0]["weight"], state["model"]["weight"])
    finally:
        dist.destroy_process_group()


def test_ranks_that_save_together_wait_for_none_where_all_tensors_are_whole(pool: ProcessPool, tmp_path: Path) -> None:
    assert pool.run(write_whole_tensors_together, 2, tmp_path) == [True, True]
