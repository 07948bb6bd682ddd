"""Focal loss is the paper's formula, cross entropy at gamma 0, and finite at any logit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from runtime.data.fields import Fields
from runtime.errors import ObjectiveError
from runtime.losses.focal import FocalLoss

pytestmark = pytest.mark.single

generator = torch.Generator().manual_seed(0)
LOGITS = 3 * torch.randn(12, 4, generator=generator, dtype=torch.float64)
BINARY = torch.randint(0, 2, (12, 4), generator=generator)
CLASSES = torch.randint(0, 4, (12,), generator=generator)
ALPHAS = [0.1, 0.4, 0.9, 1.7]


def binary_by_the_paper(logits: Tensor, target: Tensor, gamma: float, alpha: float | None) -> np.ndarray:
    """FL(p_t) = -alpha_t (1 - p_t)^gamma log(p_t), Lin et al. 2017, equations 2, 4 and 5, written down in NumPy."""
    p, y = 1 / (1 + np.exp(-logits.numpy())), target.numpy()
    p_t = np.where(y == 1, p, 1 - p)
    alpha_t = 1.0 if alpha is None else np.where(y == 1, alpha, 1 - alpha)
    return -alpha_t * (1 - p_t) ** gamma * np.log(p_t)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("alpha", [None, 0.25])
@pytest.mark.parametrize("dtype", [torch.long, torch.float64])
def test_binary_focal_loss_is_the_papers_formula(gamma: float, alpha: float | None, dtype: torch.dtype) -> None:
    got = FocalLoss(gamma=gamma, alpha=alpha).losses(LOGITS, BINARY.to(dtype))
    assert got.numpy() == pytest.approx(binary_by_the_paper(LOGITS, BINARY, gamma, alpha), rel=1e-12)


@pytest.mark.parametrize("alpha", [None, 0.25])
@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_binary_focal_loss_is_torchs_cross_entropy_times_what_was_missed(gamma: float, alpha: float | None) -> None:
    cross_entropy = F.binary_cross_entropy_with_logits(LOGITS, BINARY.double(), reduction="none")
    expected = cross_entropy * (1 - torch.exp(-cross_entropy)) ** gamma
    if alpha is not None:
        expected = expected * torch.where(BINARY == 1, alpha, 1 - alpha)
    torch.testing.assert_close(FocalLoss(gamma=gamma, alpha=alpha).losses(LOGITS, BINARY), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("alpha", [None, 0.7, ALPHAS])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("place", ["row", "image"])
def test_multi_class_focal_loss_is_torchs_cross_entropy_times_what_was_missed(
    gamma: float, alpha: Any, place: str
) -> None:
    logits, target = (LOGITS, CLASSES) if place == "row" else (LOGITS.view(3, 4, 2, 2), CLASSES.view(3, 2, 2))
    cross_entropy = F.cross_entropy(logits, target, reduction="none")
    alpha_t = torch.tensor(alpha, dtype=torch.float64)[target] if isinstance(alpha, list) else alpha or 1.0
    expected = alpha_t * cross_entropy * (1 - torch.exp(-cross_entropy)) ** gamma
    torch.testing.assert_close(FocalLoss(gamma=gamma, alpha=alpha).losses(logits, target), expected, rtol=1e-10, atol=0)


def test_the_papers_examples() -> None:
    """Section 3.2: with gamma 2, p_t 0.9 has 100 times, 0.968 1000 times less loss; p_t up to 0.5 at most 4 times less."""
    for p_t, factor, precision in ((0.9, 100, 1e-9), (0.968, 1000, 0.03), (0.5, 4, 1e-9)):
        logits = torch.tensor([[p_t / (1 - p_t)]], dtype=torch.float64).log()
        plain, focal = (FocalLoss(gamma=gamma).losses(logits, torch.ones(1, 1)).item() for gamma in (0, 2))
        assert plain / focal == pytest.approx(factor, rel=precision)
    low = FocalLoss().losses(torch.tensor([[-1.0]]), torch.ones(1, 1)) * 4
    assert low > FocalLoss(gamma=0).losses(torch.tensor([[-1.0]]), torch.ones(1, 1))


def test_at_gamma_0_class_alphas_are_torchs_class_weights() -> None:
    objective = FocalLoss(gamma=0, alpha=ALPHAS)
    weights = torch.tensor(ALPHAS, dtype=torch.float64)
    expected = F.cross_entropy(LOGITS, CLASSES, weights, reduction="sum")
    assert objective.loss_sum(LOGITS, CLASSES).item() == pytest.approx(expected.item(), rel=1e-12)


def test_two_classes_by_softmax_are_binary_by_sigmoid() -> None:
    logits = torch.stack([torch.zeros(12, dtype=torch.float64), LOGITS[:, 0]], 1)
    binary = FocalLoss(gamma=1.5, alpha=0.3).losses(LOGITS[:, 0], BINARY[:, 0])
    torch.testing.assert_close(FocalLoss(gamma=1.5, alpha=[0.7, 0.3]).losses(logits, BINARY[:, 0]), binary)
    torch.testing.assert_close(FocalLoss(gamma=1.5, alpha=[0.7, 0.3]).losses(LOGITS[:, 0], BINARY[:, 0]), binary)


def test_soft_labels_agree_with_the_probability_of_agreement() -> None:
    target = torch.rand(12, 4, generator=generator, dtype=torch.float64)
    p = LOGITS.sigmoid()
    stop_consensus = p * target + (1 - p) * (1 - target)
    expected = F.binary_cross_entropy(p, target, reduction="none") * (1 - stop_consensus) ** 2
    torch.testing.assert_close(FocalLoss().losses(LOGITS, target), expected)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0, 2.0])
@pytest.mark.parametrize("kind", ["binary", "multi-class"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_in_single_precision_leave_loss_and_gradient_finite(
    gamma: float, kind: str, dtype: torch.dtype
) -> None:
    extreme = torch.tensor([-1e4, -200.0, -90.0, -20.0, 0.0, 20.0, 90.0, 200.0, 1e4])
    logits = (extreme if kind == "binary" else torch.stack([extreme, -extreme], 1)).to(dtype).requires_grad_()
    for truth in (0, 1):
        target = torch.full((9,), truth)
        losses = FocalLoss(gamma=gamma).losses(logits, target)
        (gradient,) = torch.autograd.grad(losses.sum(), logits)
        assert losses.dtype == torch.float32
        assert losses.isfinite().all()
        assert gradient.isfinite().all()
        # Right where the model is as wrong as can be: the loss is the logit (twice, for two logits), the modulation 1.
        wrong = logits.detach().float()[-1 if truth == 0 else 0]
        expected = wrong.abs().item() if kind == "binary" else (wrong[0] - wrong[1]).abs().item()
        worst = losses[-1 if truth == 0 else 0] if kind == "binary" else losses.max()
        assert worst.item() == pytest.approx(expected, rel=1e-6)


def test_small_losses_keep_their_digits_in_single_precision() -> None:
    logits = torch.tensor([8.0, 15.0])
    expected = np.log1p(np.exp(-logits.double().numpy())) * (1 / (1 + np.exp(logits.double().numpy()))) ** 2
    assert FocalLoss().losses(logits, torch.ones(2)).numpy() == pytest.approx(expected, rel=1e-5, abs=0)


def test_it_is_divided_by_the_targets_that_count() -> None:
    target = CLASSES.clone()
    target[[2, 5, 6]] = -100
    objective = FocalLoss(alpha=ALPHAS)
    assert objective.checked_weight((None, target), 12) == 9
    assert objective.losses(LOGITS, target)[[2, 5, 6]].tolist() == [0, 0, 0]
    kept = FocalLoss(alpha=ALPHAS).loss_sum(LOGITS[target != -100], target[target != -100])
    assert objective.loss_sum(LOGITS, target).item() == pytest.approx(kept.item())
    assert FocalLoss().checked_weight((None, BINARY), 12) == 48
    objective.fields = Fields(weight=2)
    assert objective.checked_weight((None, target, torch.arange(12)), 12) == sum(range(12)) - 2 - 5 - 6


def test_a_sample_of_weight_two_counts_twice() -> None:
    weights = torch.tensor([2, 0, 1] * 4)
    rows = torch.arange(12).repeat_interleave(weights)
    objective = FocalLoss(alpha=0.25)
    objective.fields = Fields(weight=2)
    weighted = objective.loss_of(LOGITS, (None, BINARY, weights))
    expected = FocalLoss(alpha=0.25).loss_sum(LOGITS[rows], BINARY[rows])
    assert weighted.sum.item() == pytest.approx(expected.item())
    assert objective.checked_weight((None, BINARY, weights), 12) == 4 * len(rows)


def test_metrics_see_probabilities() -> None:
    target = CLASSES.clone()
    target[3] = -100
    probabilities, truth = FocalLoss().metric_inputs(LOGITS, (None, target))
    torch.testing.assert_close(probabilities, LOGITS.softmax(-1)[target != -100])
    assert torch.equal(truth, target[target != -100])
    probabilities, truth = FocalLoss().metric_inputs(LOGITS, (None, BINARY.double()))
    torch.testing.assert_close(probabilities, LOGITS.sigmoid())
    assert torch.equal(truth, BINARY)


@pytest.mark.parametrize(
    ("args", "words"),
    [({"gamma": -1.0}, "negative"), ({"alpha": [0.5, -1.0]}, "negative"), ({"alpha": 2.0}, "between 0 and 1")],
)
def test_arguments_that_make_no_sense_are_refused(args: dict[str, Any], words: str) -> None:
    with pytest.raises(ObjectiveError, match=words):
        FocalLoss(**args)


@pytest.mark.parametrize(
    ("output", "target", "words"),
    [
        (torch.zeros(3, 1), torch.zeros(3), "classes in dimension 1|target's shape"),
        (torch.zeros(3, 4, 2), torch.zeros(3, 4).long(), "classes in dimension 1"),
        (torch.zeros(3, 2), torch.zeros(3).long(), "4 alphas for 2 classes"),
        (torch.zeros(3, 2), torch.zeros(3, 2).long(), "4 alphas"),
    ],
)
def test_what_does_not_fit_is_refused(output: Tensor, target: Tensor, words: str) -> None:
    with pytest.raises(ObjectiveError, match=words):
        FocalLoss(alpha=ALPHAS).losses(output, target)
