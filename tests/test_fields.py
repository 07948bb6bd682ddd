"""Which part of a batch is what."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from runtime.data.fields import Fields
from runtime.errors import ObjectiveError

pytestmark = pytest.mark.single

ROWS: dict[str, Any] = {"words": torch.zeros(2, 3), "mask": torch.ones(2, 3), "label": torch.tensor([0, 1]), "w": 2.0}


def test_a_pair_is_inputs_and_target() -> None:
    assert Fields().arguments(("x", "y")) == (("x",), {})
    assert Fields().target_of(("x", "y")) == "y"


def test_mapped_inputs_become_keyword_arguments() -> None:
    assert Fields().arguments({"inputs": {"a": 1}, "target": 2}) == ((), {"a": 1})


@pytest.mark.parametrize(
    ("inputs", "positional", "named"),
    [
        ("w", (2.0,), {}),
        (["words", "mask"], (), {"words": ROWS["words"], "mask": ROWS["mask"]}),
        ({"x": "words"}, (), {"x": ROWS["words"]}),
    ],
)
def test_named_inputs_reach_the_model_as_the_configuration_says(
    inputs: Any, positional: tuple[Any, ...], named: dict[str, Any]
) -> None:
    assert Fields(inputs=inputs).arguments(ROWS) == (positional, named)


def test_positions_name_the_parts_of_a_tuple() -> None:
    fields = Fields(inputs=[2, 0], target=1, weight=3)
    assert fields.arguments(("a", "b", "c", "d")) == (("c", "a"), {})
    assert (fields.target_of("abcd"), fields.weight_of("abcd"), fields.group_of("abcd")) == ("b", "d", None)


def test_a_third_part_may_be_named_alone() -> None:
    fields = Fields(weight=2)
    assert fields.arguments(("a", "b", "c")) == (("a",), {})
    assert (fields.target_of(("a", "b", "c")), fields.weight_of(("a", "b", "c"))) == ("b", "c")
    with pytest.raises(ObjectiveError, match="a tuple of 4; or name in"):
        fields.target_of(("a", "b", "c", "d"))


@pytest.mark.parametrize(
    ("fields", "batch", "inputs", "target"),
    [
        (Fields(inputs="words"), {"words": "x", "target": "y"}, "x", "y"),
        (Fields(inputs={"a": "words"}), {"words": "x", "mask": "m", "target": "y"}, "x", "y"),
        (Fields(target="label"), {"inputs": "x", "label": "y"}, "x", "y"),
        (Fields(inputs=0), ("x", "y"), "x", "y"),
        (Fields(inputs=1), ("y", "x"), "x", "y"),
        (Fields(target=0), ("y", "x"), "x", "y"),
        (Fields(inputs=0, weight=1), ("x", "w", "y"), "x", "y"),
        (Fields(weight=0), ("w", "x", "y"), "x", "y"),
        (Fields(id=1), ("x", "i", "y"), "x", "y"),
    ],
)
def test_what_one_key_names_leaves_the_default_of_the_other(
    fields: Fields, batch: Any, inputs: str, target: str
) -> None:
    positional, named = fields.arguments(batch)
    assert [*positional, *named.values()] == [inputs]
    assert fields.target_of(batch) == target


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Fields(inputs="words").target_of(ROWS), "'label'.* target that its output is compared with"),
        (lambda: Fields(target="label").arguments(ROWS), "'words'.* inputs of the model"),
        (lambda: Fields(inputs=0).target_of(("x", "y", "z")), "a tuple of 3"),
        (lambda: Fields(inputs=[0, 1]).target_of(("x", "y")), "a tuple of 2"),
        (lambda: Fields(id=1).target_of(("x", "id")), "target that its output is compared with"),
        (lambda: Fields(inputs="target").target_of({"target": 1}), "target that its output is compared with"),
    ],
)
def test_a_default_that_would_be_a_guess_is_refused(call: Any, words: str) -> None:
    with pytest.raises(ObjectiveError, match=words):
        call()


def test_a_target_may_have_several_parts() -> None:
    assert Fields(target=[2, 1]).target_of(("a", "b", "c")) == ("c", "b")
    assert Fields(target=["label"]).target_of(ROWS) == (ROWS["label"],)


def test_the_output_is_a_key_an_attribute_or_a_position() -> None:
    assert Fields(output="logits").output_of(SimpleNamespace(logits=3)) == 3
    assert Fields(output="logits").output_of({"logits": 4}) == 4
    assert Fields(output=1).output_of((5, 6)) == 6


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Fields(target="labels").target_of(ROWS), "data.fields: the batch has no 'labels': .*'label'"),
        (lambda: Fields(target=7).target_of((1, 2)), "no 7: it is a tuple of 2"),
        (lambda: Fields().target_of(ROWS), "must be .inputs, target."),
        (lambda: Fields(output="logits").output_of(torch.zeros(2)), "model.output: .* no 'logits'"),
    ],
)
def test_a_missing_part_is_named_with_what_is_there(call: Any, words: str) -> None:
    with pytest.raises(ObjectiveError, match=words):
        call()
