"""What tells rounding from an error: elements without a true gradient are found exactly, and all others are held."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.compared_weights import SAME_OUTPUT, Truth, assert_weights_agree, difference
from tests.observed import configuration

WIDTH = 12
GPT = {"target": "tiny_sharded:Gpt", "args": {"dtype": "float32"}}
KEY_BIASES = [f"gpt.blocks.{block}.attention.query_key_value.bias" for block in (0, 1)]


def gpt(folder: Path) -> dict[str, Any]:
    data = {"train": {"target": "tiny_sharded:sentences", "args": {}}}
    return configuration(folder, model=GPT, data=data, objective="CrossEntropyLoss")


def weights_of(truth: Truth, seed: int = 0) -> dict[str, Tensor]:
    """Weights as after some training: no bias is zero any more."""
    generator = torch.Generator().manual_seed(seed)
    state = truth.module.model.state_dict()
    return {name: (v + 0.05 * torch.randn(v.shape, generator=generator)).float() for name, v in state.items()}


def moved(state: dict[str, Tensor], name: str, place: Any, by: float) -> dict[str, Tensor]:
    other = {**state, name: state[name].clone()}
    other[name][place] += by
    return other


def test_the_biases_of_attentions_keys_are_free_and_nothing_else_is(tmp_path: Path) -> None:
    """q . (k + b) adds q . b to the scores of a query over all keys alike, which softmax does not see."""
    truth = Truth(gpt(tmp_path))
    free = truth.free(weights_of(truth))
    found = {name: mask.nonzero().flatten().tolist() for name, mask in free.items() if mask.any()}
    assert found == {name: list(range(WIDTH, 2 * WIDTH)) for name in KEY_BIASES}


def test_a_bias_before_batch_norm_is_free_and_nothing_else_is(tmp_path: Path) -> None:
    config = configuration(tmp_path, model={"target": "tiny_zero_gradients:BiasBeforeNorm"})
    truth = Truth(config)
    state = {**truth.module.model.state_dict()}
    found = {name: mask.all() for name, mask in truth.free(state).items() if mask.any()}
    assert found == {"net.0.bias": True}
    assert_weights_agree(config, state, moved(state, "net.0.bias", slice(None), 0.01), within=1e-9)


def test_a_token_that_never_occurs_is_held(tmp_path: Path) -> None:
    """Its gradient is exactly zero, so no rounding moves it."""
    config = configuration(
        tmp_path,
        model={"target": "tiny:Tagger"},
        data={"train": {"target": "tiny_zero_gradients:one_token", "args": {}}},
        objective="CrossEntropyLoss",
    )
    truth = Truth(config)
    state = {**truth.module.model.state_dict()}
    assert not any(mask.any() for mask in truth.free(state).values())
    with pytest.raises(AssertionError, match=r"embedding\.weight"):
        assert_weights_agree(config, state, moved(state, "embedding.weight", (5, 0), 1e-5), within=5e-6)


def test_free_elements_may_differ_by_more_than_all_others(tmp_path: Path) -> None:
    config = gpt(tmp_path)
    state = weights_of(Truth(config))
    other = moved(state, KEY_BIASES[1], slice(WIDTH, 2 * WIDTH), 0.01)
    found = difference(config, state, other)
    assert found.held == 0.0
    assert found.free == pytest.approx(0.01, rel=1e-5)
    assert found.output < 1e-15
    assert_weights_agree(config, state, other, within=1e-9)


@pytest.mark.parametrize("place", [0, WIDTH - 1, 2 * WIDTH, 3 * WIDTH - 1])
def test_the_biases_of_queries_and_values_are_held(tmp_path: Path, place: int) -> None:
    config = gpt(tmp_path)
    state = weights_of(Truth(config))
    with pytest.raises(AssertionError, match=r"blocks\.0\.attention\.query_key_value\.bias"):
        assert_weights_agree(config, state, moved(state, KEY_BIASES[0], place, 1e-5), within=5e-6)


def test_nan_is_the_largest_difference(tmp_path: Path) -> None:
    config = gpt(tmp_path)
    state = weights_of(Truth(config))
    truth = Truth(config)
    truth.free = lambda *states: {}  # type: ignore[method-assign]  # a NaN leaves no gradient to judge by
    found = truth.difference(state, moved(state, "gpt.final_norm.bias", 0, float("nan")))
    assert not found.held < 1.0


def test_free_elements_that_change_the_output_are_refused(tmp_path: Path) -> None:
    """So a mask that is too wide hides nothing."""
    config = gpt(tmp_path)
    truth = Truth(config)
    state = weights_of(truth)
    truth.free = lambda *states: {"gpt.final_norm.bias": torch.ones(WIDTH, dtype=torch.bool)}  # type: ignore[method-assign]
    found = truth.difference(state, moved(state, "gpt.final_norm.bias", 0, 1e-5))
    assert found.held == 0.0
    assert found.output > 10 * SAME_OUTPUT
