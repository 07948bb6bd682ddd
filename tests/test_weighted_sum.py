"""A weighted sum of losses is the sum of torch's own means over the whole batch, each over what counts for it."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from runtime.data.fields import Fields
from runtime.losses.by_name import torch_loss
from runtime.losses.weighted_sum import WeightedSum
from runtime.objective import Loss, Objective, TrainingModule, add_weights, starting_gradient

pytestmark = pytest.mark.single

generator = torch.Generator().manual_seed(0)
INPUTS = torch.randn(9, 4, generator=generator, dtype=torch.float64)
LABEL = torch.tensor([0, -100, 2, -100, -100, 1, 2, -100, 0])
SIZE = torch.randn(9, 2, generator=generator, dtype=torch.float64)
TRUST = torch.tensor([1, 2, 0, 1, 1, 3, 1, 1, 0])


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        torch.manual_seed(1)
        self.label, self.size = nn.Linear(4, 3).double(), nn.Linear(4, 2).double()

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        return {"label": self.label(inputs), "size": self.size(inputs)}


class Decay(Objective):
    """Of a user's own: no output, one named part, counts samples."""

    def forward(self, model: nn.Module, batch: Any) -> Loss:
        loss = cast("Tensor", sum(p.square().sum() for p in model.parameters())) * len(batch["inputs"])
        return Loss(loss, {"doubled": 2 * loss.detach()})


def objective(**more: Objective) -> WeightedSum:
    label, size = torch_loss(nn.CrossEntropyLoss, {}), torch_loss(nn.MSELoss, {})
    label.fields = Fields(output="label", target="label")
    size.fields = Fields(output="size", target="size", weight="trust")
    total = WeightedSum({"label": label, "size": size, **more}, {"label": 0.3, "size": 2.0, **dict.fromkeys(more, 0.1)})
    total.fields = Fields(inputs="inputs")
    return total


def batch_of(rows: Tensor) -> dict[str, Tensor]:
    return {"inputs": INPUTS[rows], "label": LABEL[rows], "size": SIZE[rows], "trust": TRUST[rows]}


def truth(model: TwoHeads) -> tuple[Tensor, Tensor]:
    """Torch's means over the whole batch; a sample of weight 2 is there twice."""
    repeated = torch.arange(9).repeat_interleave(TRUST)
    return F.cross_entropy(model.label(INPUTS), LABEL), F.mse_loss(model.size(INPUTS[repeated]), SIZE[repeated])


@pytest.mark.parametrize("parts", [1, 2, 5, 9])
def test_each_loss_is_divided_by_what_it_counts_itself(parts: int) -> None:
    model, total = TwoHeads(), objective()
    module = TrainingModule(model, total)
    label, size = truth(model)
    expected = torch.autograd.grad(0.3 * label + 2.0 * size, list(model.parameters()))
    batches = [batch_of(rows) for rows in torch.arange(9).tensor_split(parts)]
    weight: Any = 0.0
    for batch in batches:
        weight = add_weights(weight, total.checked_weight(batch, len(batch["label"])))
    assert weight == (5.0, 20.0)
    sums: dict[str, float] = {}
    for batch in batches:
        loss = module(batch)
        loss.sum.backward(starting_gradient(loss.sum, weight))
        sums = {name: sums.get(name, 0.0) + part.item() for name, part in loss.parts.items()}
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-11, atol=0)
    assert model.calls == parts  # once a microbatch, whatever the number of losses
    means = total.means(sums, weight)
    assert means["label"] == pytest.approx(label.item(), rel=1e-12)
    assert means["size"] == pytest.approx(size.item(), rel=1e-12)
    assert means["loss"] == pytest.approx((0.3 * label + 2.0 * size).item(), rel=1e-12)


def test_where_nothing_counts_for_one_loss_the_others_are_minimised() -> None:
    model, total = TwoHeads(), objective()
    rows = torch.tensor([1, 3, 4])  # without any label
    loss = TrainingModule(model, total)(batch_of(rows))
    weight = total.checked_weight(batch_of(rows), 3)
    assert weight == (0.0, 8.0)
    loss.sum.backward(starting_gradient(loss.sum, weight))
    assert not model.label.weight.grad.any()  # type: ignore[union-attr]
    assert model.size.weight.grad.isfinite().all()  # type: ignore[union-attr]
    assert set(total.means({"label": 0.0, "size": 4.0}, weight)) == {"loss", "size"}


def test_a_users_own_objective_may_be_one_of_the_losses() -> None:
    model, total = TwoHeads(), objective(decay=Decay())
    batch = batch_of(torch.arange(9))
    loss = TrainingModule(model, total)(batch)
    weight = total.checked_weight(batch, 9)
    means = total.means({name: part.item() for name, part in loss.parts.items()}, weight)
    expected = sum(p.square().sum().item() for p in model.parameters())
    assert means["decay"] == pytest.approx(expected)
    assert means["decay/doubled"] == pytest.approx(2 * expected)
    label, size = truth(model)
    assert means["loss"] == pytest.approx(0.3 * label.item() + 2.0 * size.item() + 0.1 * expected)


def test_metrics_are_given_what_the_first_loss_gives_them() -> None:
    model, total = TwoHeads(), objective()
    batch = batch_of(torch.arange(9))
    loss = TrainingModule(model, total)(batch)
    probabilities, target = total.metric_inputs(loss.output, batch)
    assert torch.equal(target, LABEL[LABEL >= 0])
    torch.testing.assert_close(probabilities, model.label(INPUTS).softmax(-1)[LABEL >= 0])
