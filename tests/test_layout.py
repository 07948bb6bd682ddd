"""How tensors lie in memory belongs to a run's state: channels_last and transposed weights resume bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.checkpoints.load import load_state
from runtime.checkpoints.serialization import join_state, split_state
from runtime.errors import ConfigurationError
from runtime.state.memory_layout import is_dense, laid_out
from tests.observed import assert_bitwise_equal, configuration, observe
from tests.process_pool import ProcessPool, RemoteError
from tests.test_resumption import observe_stopping

ADAPTIVE = ("Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adagrad", "Adadelta", "RMSprop", "Rprop", "ASGD", "Adafactor")
FUSED = ("Adam", "AdamW", "Adagrad", "SGD")
OPTIMIZERS = [
    *((name, fused) for name in FUSED for fused in (True, False)),
    *((name, None) for name in (*ADAPTIVE, "SGD") if name not in FUSED),
]


def convolved(folder: Path, layout: str, **changes: Any) -> dict[str, Any]:
    return configuration(
        folder,
        **{
            "model": {"target": "tiny_layouts:Convolved", "args": {"layout": layout}},
            "data": {"train": {"target": "tiny:points", "args": {"size": 64, "dtype": "float32"}}},
            "optimizer": {"target": "AdamW", "args": {"lr": 0.01}},
            "averaging": {"decay": 0.9},
            "limit": {"steps": 6},
            **changes,
        },
    )


def resumed_and_whole(
    pool: ProcessPool, folder: Path, world_size: int, layout: str, **changes: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    whole = pool.run(observe, world_size, convolved(folder / "whole", layout, **changes))[0]
    config = convolved(folder / "resumed", layout, **changes)
    assert pool.run(observe_stopping, world_size, config, 3)[0]["step"] == 3
    return whole, pool.run(observe, world_size, config)[0]


def assert_same_state(first: Path, second: Path) -> None:
    """Every tensor of two checkpoints is equal in its bits and its strides."""
    (_, one), (_, other) = (
        split_state(
            dict(zip(("model", "training"), load_state(max((folder / "checkpoints").glob("step-*"))), strict=True))
        )
        for folder in (first, second)
    )
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name
        assert tensor.stride() == other[name].stride(), name


@pytest.mark.single
@pytest.mark.parametrize(("optimizer", "fused"), OPTIMIZERS)
def test_every_optimizer_resumes_bit_for_bit_in_channels_last(
    pool: ProcessPool, tmp_path: Path, optimizer: str, fused: bool | None
) -> None:
    args = {"lr": 0.01, **({"momentum": 0.9} if optimizer in ("SGD", "RMSprop") else {})}
    section = {"target": optimizer, "args": args if fused is None else {**args, "fused": fused}}
    whole, resumed = resumed_and_whole(pool, tmp_path, 1, "channels_last", optimizer=section)
    assert_bitwise_equal(whole, resumed)
    assert {step: whole["losses"][step] for step in resumed["losses"]} == resumed["losses"]
    assert_same_state(tmp_path / "whole", tmp_path / "resumed")


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.single), 2])
@pytest.mark.parametrize("layout", ["channels_last", "late", "transposed", "gaps", "contiguous"])
def test_every_layout_resumes_bit_for_bit(pool: ProcessPool, tmp_path: Path, world_size: int, layout: str) -> None:
    averaging = {"kind": "swa", "start": "1 step", "every": "1 step"}
    whole, resumed = resumed_and_whole(pool, tmp_path, world_size, layout, averaging=averaging)
    assert_bitwise_equal(whole, resumed)
    assert_same_state(tmp_path / "whole", tmp_path / "resumed")


@pytest.mark.single
def test_a_weight_with_gaps_in_memory_is_updated_as_a_contiguous_one_is(pool: ProcessPool, tmp_path: Path) -> None:
    gaps, contiguous = (pool.run(observe, 1, convolved(tmp_path / kind, kind))[0] for kind in ("gaps", "contiguous"))
    for step, loss in contiguous["losses"].items():
        assert gaps["losses"][step] == pytest.approx(loss, rel=1e-4)
    with pytest.raises(RemoteError, match=r"optimizer.args.fused: a parameter of shape \(3, 16\) is a view with gaps"):
        optimizer = {"target": "AdamW", "args": {"lr": 0.01, "fused": True}}
        pool.run(observe, 1, convolved(tmp_path / "fused", "gaps", optimizer=optimizer))


@pytest.mark.parametrize("layout", ["channels_last", "transposed"])
def test_fsdp_names_what_it_cannot_take_before_it_starts(pool: ProcessPool, tmp_path: Path, layout: str) -> None:
    strategy = {"kind": "fsdp", "fsdp": {"wrap": ["Conv2d"]}}
    with pytest.raises(RemoteError) as refused:
        pool.run(observe, 1, convolved(tmp_path, layout, strategy=strategy))
    assert ConfigurationError.__name__ in str(refused.value)
    name = "last.weight" if layout == "transposed" else "first.weight"
    assert f"fsdp supports contiguous parameters only, but {name}" in str(refused.value)


@pytest.mark.single
def test_strides_are_kept_with_the_values_and_tied_weights_stay_one() -> None:
    tensor = torch.arange(24.0).view(2, 3, 4).permute(2, 0, 1)
    tree, tensors = split_state({"a": tensor, "b": tensor, "plain": torch.ones(2, 2), "wide": torch.ones(1).expand(3)})
    joined = join_state(tree, {name: value.contiguous() for name, value in tensors.items()})
    assert joined["a"] is joined["b"]
    assert torch.equal(joined["a"], tensor)
    assert joined["a"].stride() == tensor.stride()
    assert joined["plain"].is_contiguous()
    assert joined["wide"].is_contiguous()


@pytest.mark.single
@pytest.mark.parametrize("strides", [[0, 1], [3, 1], [1], [-1, 2], [1, 2.0], ["a", 1]])
def test_strides_that_are_not_those_of_a_dense_tensor_are_refused(strides: list[Any]) -> None:
    with pytest.raises(ValueError, match="not the strides of a dense tensor"):
        laid_out(torch.zeros(2, 2), strides)


@pytest.mark.single
def test_dense_is_every_order_of_dimensions_and_nothing_with_gaps() -> None:
    whole = torch.zeros(2, 3, 1, 4)
    assert all(is_dense(t.shape, t.stride()) for t in (whole, whole.permute(3, 0, 2, 1), whole.transpose(0, 1)))
    assert not any(is_dense(t.shape, t.stride()) for t in (whole[..., :2], whole[::2].expand(2, 3, 1, 4)))


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.long), pytest.param(2, marks=pytest.mark.long), 3])
def test_zero_trains_channels_last_as_ddp_does_and_ddp_goes_on_from_it(
    pool: ProcessPool, tmp_path: Path, stage: int
) -> None:
    pytest.importorskip("deepspeed", reason="needs the extra deepspeed")
    zero = {"kind": "zero", "zero": {"stage": stage}}
    ddp = pool.run(observe, 2, convolved(tmp_path / "ddp", "channels_last"))[0]
    config = convolved(tmp_path / "zero", "channels_last", strategy=zero)
    for step in (2, 4):
        assert pool.run(observe_stopping, 2, config, step)[0]["step"] == step
    config["strategy"], config["resume"] = {"kind": "ddp"}, {"allow_changes": ["strategy"]}
    got = pool.run(observe, 2, config)[0]
    for step, loss in got["losses"].items():
        assert loss == pytest.approx(ddp["losses"][step], rel=1e-4)
