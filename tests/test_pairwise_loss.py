"""Bayesian personalised ranking against the paper's formula."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from runtime.data.fields import Fields
from runtime.errors import ObjectiveError
from runtime.losses.pairwise import BPRLoss
from runtime.objective import TrainingModule

pytestmark = pytest.mark.single


class Factors(nn.Module):
    """Matrix factorisation: the score of a user and an item is the product of their vectors."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.users = nn.Parameter(torch.randn(5, 3, generator=generator, dtype=torch.float64))
        self.items = nn.Parameter(torch.randn(7, 3, generator=generator, dtype=torch.float64))

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        return (self.users[user] * self.items[item]).sum(-1)


USER, POSITIVE = torch.tensor([0, 1, 2, 4]), torch.tensor([3, 3, 0, 6])
NEGATIVE = torch.tensor([[1, 2], [0, 0], [4, 5], [5, 3]])


def by_the_paper(model: Factors, negatives: Tensor) -> np.ndarray:
    """-ln sigmoid(x_ui - x_uj) of every pair, Rendle et al. 2009, section 4.1; the mean over a sample's negatives."""
    users, items = model.users.detach().numpy(), model.items.detach().numpy()
    losses = np.zeros(len(USER))
    for row, (u, i) in enumerate(zip(USER, POSITIVE, strict=True)):
        differences = [users[u] @ items[i] - users[u] @ items[j] for j in negatives[row]]
        losses[row] = np.mean([-np.log(1 / (1 + np.exp(-difference))) for difference in differences])
    return losses


@pytest.mark.parametrize("negatives", [1, 2])
@pytest.mark.parametrize("form", ["tuple", "mapping", "named"])
def test_the_loss_is_the_papers(negatives: int, form: str) -> None:
    model, objective = Factors(), BPRLoss()
    negative = NEGATIVE[:, 0] if negatives == 1 else NEGATIVE
    batch: Any = (USER, POSITIVE, negative)
    if form == "mapping":
        batch = {"negative": negative, "user": USER, "positive": POSITIVE}
    if form == "named":
        objective, batch = BPRLoss(user="u", positive="i", negative="j"), {"i": POSITIVE, "j": negative, "u": USER}
    loss = TrainingModule(model, objective)(batch)
    assert loss.sum.item() == pytest.approx(by_the_paper(model, NEGATIVE[:, :negatives]).sum(), rel=1e-12)
    assert objective.counts_samples
    scores, relevant = objective.metric_inputs(loss.output, batch)
    assert torch.equal(scores[:, 0], model(USER, POSITIVE))
    assert torch.equal(scores[:, negatives], model(USER, NEGATIVE[:, negatives - 1]))
    assert relevant.tolist() == [[1] + negatives * [0]] * 4


def test_pairs_may_be_weighted() -> None:
    model, objective, weights = Factors(), BPRLoss(), torch.tensor([2.0, 0.0, 1.0, 0.5])
    objective.fields = Fields(weight=3)
    batch = (USER, POSITIVE, NEGATIVE, weights)
    loss = TrainingModule(model, objective)(batch)
    assert loss.sum.item() == pytest.approx((by_the_paper(model, NEGATIVE) * weights.numpy()).sum(), rel=1e-12)
    assert not objective.counts_samples
    assert objective.checked_weight(batch, 4) == 3.5
    scores, relevant = objective.metric_inputs(loss.output, batch)
    assert scores.shape == relevant.shape == (3, 3)


def test_rated_items_are_scored_for_ranking_metrics() -> None:
    model, objective = Factors(), BPRLoss()
    objective.fields = Fields(inputs=["user", "item"], target="liked")
    liked = torch.tensor([1, 0, 0, 1])
    batch = {"user": USER, "item": POSITIVE, "liked": liked}
    loss = TrainingModule(model, objective)(batch)
    scores = model(USER, POSITIVE)
    assert loss.sum.item() == pytest.approx(F.binary_cross_entropy_with_logits(scores, liked.double()).item() * 4)
    found, relevant = objective.metric_inputs(loss.output, batch)
    assert torch.equal(found, scores)
    assert torch.equal(relevant, liked)


def test_far_apart_scores_stay_finite() -> None:
    class Far(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(1e4))

        def forward(self, user: Tensor, item: Tensor) -> Tensor:
            return self.scale * item

    far = Far()
    module = TrainingModule(far, BPRLoss())
    loss = module((torch.zeros(2), torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0]))).sum
    loss.backward()
    assert loss.item() == 1e4
    assert far.scale.grad is not None
    assert far.scale.grad.item() == 1.0


def test_scores_that_are_no_scores_are_refused() -> None:
    class Vectors(Factors):
        def forward(self, user: Tensor, item: Tensor) -> Tensor:
            return self.users[user]

    with pytest.raises(ObjectiveError, match="one score for each of 4 rows"):
        TrainingModule(Vectors(), BPRLoss())((USER, POSITIVE, NEGATIVE))
