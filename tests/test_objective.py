"""The loss contract holds, and what breaks it is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from runtime.errors import ObjectiveError
from runtime.losses.by_name import torch_loss
from runtime.objective import Loss, Objective, TrainingModule, add_weights, starting_gradient

pytestmark = pytest.mark.single


class Given(nn.Module):
    """A model that returns its parameter, one row per input index."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(values)

    def forward(self, rows: Tensor) -> Tensor:
        return self.values[rows]


def test_a_filler_is_zero_with_zero_gradients_for_every_parameter_even_when_values_are_infinite() -> None:
    model = Given(torch.full((3, 2), float("inf")))
    module = TrainingModule(model, torch_loss(nn.MSELoss, {}))
    loss = module((torch.arange(3), torch.zeros(3, 2)), filler=True).sum
    loss.backward()
    assert loss.item() == 0
    assert model.values.grad is not None
    assert torch.equal(model.values.grad, torch.zeros(3, 2))


def test_an_objective_that_returns_no_scalar_is_refused() -> None:
    class PerSample(Objective):
        def forward(self, model: nn.Module, batch: Any) -> Tensor:
            return model(batch).sum(-1)

    with pytest.raises(ObjectiveError, match="scalar"):
        TrainingModule(Given(torch.zeros(3, 2)), PerSample())(torch.arange(3))


def test_mapped_inputs_become_arguments() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return self.scale * (left + right)

    batch = {"inputs": {"left": torch.ones(2), "right": torch.ones(2)}, "target": torch.zeros(2)}
    loss = TrainingModule(Sum(), torch_loss(nn.MSELoss, {}))(batch)
    assert isinstance(loss, Loss)
    assert loss.sum.item() == 8


@pytest.mark.parametrize(
    ("weight", "words"),
    [(-1.0, "-1.0"), (float("nan"), "nan"), (float("inf"), "inf"), ("x", "ValueError"), (None, "TypeError")],
)
def test_a_weight_that_nothing_can_be_divided_by_is_refused(weight: Any, words: str) -> None:
    class Weighing(Objective):
        def weight(self, batch: Any) -> Any:
            return weight

    with pytest.raises(ObjectiveError, match=words):
        Weighing().checked_weight(None, 1)


@pytest.mark.parametrize("part", [1.0, torch.zeros(2)])
def test_a_part_that_is_no_sum_is_refused(part: Any) -> None:
    class Parted(Objective):
        def forward(self, model: nn.Module, batch: Any) -> Loss:
            return Loss(model(batch).sum(), {"extra": part})

    with pytest.raises(ObjectiveError, match="'extra'"):
        TrainingModule(Given(torch.zeros(3, 2)), Parted())(torch.arange(3))


@pytest.mark.parametrize("name", ["loss", "weight", "samples"])
def test_a_part_may_not_bear_the_name_of_a_figure_that_is_there_already(name: str) -> None:
    class Parted(Objective):
        def forward(self, model: nn.Module, batch: Any) -> Loss:
            total = model(batch).sum()
            return Loss(total, {name: total.detach()})

    module = TrainingModule(Given(torch.ones(3, 2)), Parted())
    with pytest.raises(ObjectiveError, match=f"cannot be called '{name}'"):
        module(torch.arange(3))


def test_a_backward_pass_from_several_sums_gives_the_gradient_of_the_sum_of_the_quotients() -> None:
    values = torch.tensor([3.0, 5.0, 7.0], requires_grad=True)
    sums = values.square()
    sums.backward(starting_gradient(sums, (2.0, 4.0, 0.0), scale=3.0))
    assert values.grad is not None
    assert values.grad.tolist() == [3 * 6 / 2, 3 * 10 / 4, 0]  # nothing counts for the third
    assert starting_gradient(sums[0], 4.0, scale=3.0).item() == 0.75


def test_weights_of_sets_of_samples_add_up() -> None:
    assert add_weights(add_weights(0.0, 2.0), 3.0) == 5.0
    assert add_weights(add_weights(0.0, (2.0, 1.0)), (3.0, 0.0)) == (5.0, 1.0)


def test_the_weight_is_the_number_of_samples_unless_an_objective_says_otherwise() -> None:
    assert Objective().checked_weight(None, 7) == 7.0
