"""State as tensors and JSON, bit for bit, without pickle."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from runtime.checkpoints.serialization import join_state, split_state, write_tensors
from runtime.errors import CheckpointError
from runtime.state.durable_files import checksum

pytestmark = pytest.mark.single

scalars = st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text(max_size=5)
nested = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=4) | st.integers(-5, 99), inner, max_size=3)
        | st.tuples(inner, inner)
    ),
    max_leaves=12,
)


@given(state=nested)
@settings(max_examples=100, deadline=None)
def test_plain_data_comes_back_with_its_types(state: Any) -> None:
    tree, tensors = split_state(state)
    back = join_state(json.loads(json.dumps(tree, allow_nan=False)), tensors)
    assert back == state
    assert repr(back) == repr(state)


def test_nan_comes_back() -> None:
    assert math.isnan(join_state(json.loads(json.dumps(split_state(float("nan"))[0], allow_nan=False)), {}))


OPTIMIZERS = [
    ("AdamW", {}), ("AdamW", {"fused": True}), ("Adam", {"amsgrad": True}), ("SGD", {}), ("SGD", {"momentum": 0.9}),
    ("Adagrad", {}), ("RMSprop", {"centered": True, "momentum": 0.5}), ("Adadelta", {}), ("Adamax", {}), ("ASGD", {}),
    ("NAdam", {}), ("RAdam", {}), ("Rprop", {}), ("Adafactor", {}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "args"), OPTIMIZERS, ids=str)
def test_optimizers_go_on_bitwise_after_a_round_trip(tmp_path: Path, name: str, args: dict[str, Any]) -> None:
    def make() -> tuple[nn.Linear, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Linear(5, 3)
        return model, getattr(torch.optim, name)(model.parameters(), lr=0.01, **args)

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> None:
        for number in numbers:
            torch.manual_seed(number)
            optimizer.zero_grad()
            model(torch.randn(4, 5)).square().sum().backward()
            optimizer.step()

    model, optimizer = make()
    steps(model, optimizer, range(4))
    tree, tensors = split_state({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    write_tensors(tmp_path / "t.safetensors", tensors)
    steps(model, optimizer, range(4, 8))
    again, optimizer_again = make()
    state = join_state(json.loads(json.dumps(tree, allow_nan=False)), load_file(tmp_path / "t.safetensors"))
    again.load_state_dict(state["model"])
    optimizer_again.load_state_dict(state["optimizer"])
    steps(again, optimizer_again, range(4, 8))
    assert torch.equal(model.weight, again.weight)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
)
def test_safetensors_reads_what_is_written(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {
        "matrix": torch.arange(12).reshape(3, 4).to(dtype),
        "scalar": torch.tensor(1).to(dtype),
        "empty": torch.zeros(0, 4).to(dtype),
    }
    size, digest = write_tensors(tmp_path / "t.safetensors", tensors)
    with safe_open(tmp_path / "t.safetensors", framework="pt") as file:
        for name, tensor in tensors.items():
            assert torch.equal(file.get_tensor(name), tensor)
            assert file.get_tensor(name).dtype == dtype
    assert (tmp_path / "t.safetensors").stat().st_size == size
    assert checksum(tmp_path / "t.safetensors") == digest


def test_tied_weights_are_stored_once_and_views_apart() -> None:
    table = torch.randn(4, 3)
    tree, tensors = split_state({"embedding": table, "head": table, "transposed": table.t()})
    assert set(tensors) == {"embedding", "transposed"}
    back = join_state(tree, tensors)
    assert torch.equal(back["head"], table)
    assert torch.equal(back["transposed"], table.t())


def test_an_object_that_would_need_pickle_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"'optimizer/state/callback' is a function"):
        split_state({"optimizer": {"state": {"callback": make_nothing}}})


def make_nothing() -> None:
    return None
