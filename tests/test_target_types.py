"""Targets and outputs of every type mean what they say: nothing is cast, cut off or rounded without a word."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sklearn import metrics as sk
from torch import Tensor, nn
from torchmetrics import classification as c
from torchmetrics import regression as r

from runtime.data.fields import Fields
from runtime.errors import EvaluationError, ObjectiveError
from runtime.evaluation.metrics import MetricSet
from runtime.losses.by_name import NextTokenLoss, torch_loss
from runtime.losses.focal import FocalLoss
from runtime.objective import Objective, TrainingModule

pytestmark = pytest.mark.single

SIZE = 60
generator = torch.Generator().manual_seed(3)
LOGITS = torch.randn(SIZE, generator=generator)
YES = (LOGITS + torch.randn(SIZE, generator=generator) > 0).float()
SOFT = 0.1 + 0.8 * YES
SCORES = torch.randn(SIZE, 4, generator=generator)
CLASSES = torch.randint(0, 4, (SIZE,), generator=generator)
SMOOTHED = 0.15 + 0.4 * nn.functional.one_hot(CLASSES, 4).float()
CPU = torch.device("cpu")


class Given(nn.Module):
    """Returns what it is called with, times a parameter that is 1."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.ones((), dtype=dtype))

    def forward(self, inputs: Any) -> Any:
        return inputs * self.one


def measured(objective: Objective, output: Tensor, target: Tensor, metrics: dict[str, Any], cut: int) -> dict[str, Any]:
    found = MetricSet(metrics, CPU)
    for rows in torch.arange(len(output)).split(cut):
        found.update(objective, output[rows], (None, target[rows]))
    return found.compute()


@pytest.mark.parametrize("cut", [SIZE, 7, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "kind", ["BCEWithLogitsLoss", "BCELoss", "SoftMarginLoss", "MultiLabelSoftMarginLoss", "FocalLoss"]
)
def test_metrics_of_classes_see_the_likelier_class_of_a_soft_target_and_metrics_of_values_the_target(
    kind: str, dtype: torch.dtype, cut: int
) -> None:
    objective = FocalLoss() if kind == "FocalLoss" else torch_loss(getattr(nn, kind), {})
    probabilities = LOGITS.sigmoid()
    output, target = probabilities if kind == "BCELoss" else LOGITS, SOFT.to(dtype)
    if kind == "SoftMarginLoss":
        target = (2 * SOFT - 1).to(dtype)
    found = measured(
        objective,
        output,
        target,
        {
            "accuracy": c.BinaryAccuracy(),
            "f1": c.BinaryF1Score(),
            "auroc": c.BinaryAUROC(),
            "mse": r.MeanSquaredError(),
        },
        cut,
    )
    predicted = (probabilities > 0.5).numpy()
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(YES, predicted))
    assert found["f1"] == pytest.approx(sk.f1_score(YES, predicted))
    assert found["auroc"] == pytest.approx(sk.roc_auc_score(YES, probabilities))
    assert found["mse"] == pytest.approx(float((probabilities - SOFT).square().mean()), rel=1e-2)


@pytest.mark.parametrize("cut", [SIZE, 7])
def test_metrics_of_class_probabilities_see_the_likeliest_class_or_the_probabilities(cut: int) -> None:
    metrics = {"accuracy": c.MulticlassAccuracy(4, average="micro"), "brier": r.MeanSquaredError()}
    found = measured(torch_loss(nn.CrossEntropyLoss, {}), SCORES, SMOOTHED, metrics, cut)
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(CLASSES, SCORES.argmax(-1)))
    assert found["brier"] == pytest.approx(float((SCORES.softmax(-1) - SMOOTHED).square().mean()))


def test_soft_targets_without_weight_are_in_no_metric() -> None:
    objective = torch_loss(nn.BCEWithLogitsLoss, {})
    objective.fields = Fields(inputs=0, target=1, weight=2)
    weights = torch.arange(SIZE) % 3
    found = MetricSet({"mse": r.MeanSquaredError()}, CPU)
    found.update(objective, LOGITS, (None, SOFT, weights))
    expected = (LOGITS.sigmoid() - SOFT).square()[weights != 0].mean()
    assert found.compute()["mse"] == pytest.approx(float(expected))


class Own(Objective):
    def metric_inputs(self, output: Any, batch: Any) -> tuple[Any, ...]:
        return output, batch[1]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.bool])
def test_metrics_do_not_overflow_in_a_short_integer(dtype: torch.dtype) -> None:
    truth = torch.tensor([0, 100, 120, 100]).to(dtype)
    output = torch.tensor([1.0, 90.0, 110.0, 100.0])
    metrics = {"r2": r.R2Score(), "mae": r.MeanAbsoluteError()}
    found = measured(Own(), output, truth, metrics, 4)
    assert found["r2"] == pytest.approx(sk.r2_score(truth.double(), output))
    assert found["mae"] == pytest.approx(float((output - truth.double()).abs().mean()))


INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
ELEMENTS = [
    "MSELoss",
    "L1Loss",
    "HuberLoss",
    "SmoothL1Loss",
    "BCEWithLogitsLoss",
    "PoissonNLLLoss",
    "MultiLabelSoftMarginLoss",
]


def loss_and_gradient(objective: Objective, inputs: Tensor, target: Any, dtype: torch.dtype = torch.float32) -> Any:
    model = Given(dtype)
    loss = TrainingModule(model, objective)((inputs.to(dtype), target)).sum
    loss.backward()
    assert model.one.grad is not None
    return loss.detach().double(), model.one.grad.double(), objective.checked_weight((inputs, target), len(inputs))


@pytest.mark.parametrize("name", ELEMENTS)
@pytest.mark.parametrize("dtype", [*INTEGERS, torch.bool, torch.float64, torch.float16, torch.bfloat16])
def test_a_target_of_numbers_may_be_of_any_real_type(name: str, dtype: torch.dtype) -> None:
    objective = torch_loss(getattr(nn, name), {})
    target = (SCORES > 0).float()
    assert loss_and_gradient(objective, SCORES, target.to(dtype)) == loss_and_gradient(objective, SCORES, target)


@pytest.mark.parametrize("dtype", [*INTEGERS, torch.bool])
def test_class_numbers_may_be_of_any_integer_type(dtype: torch.dtype) -> None:
    target = CLASSES % 2
    for objective in (torch_loss(nn.CrossEntropyLoss, {}), torch_loss(nn.MultiMarginLoss, {}), FocalLoss()):
        assert loss_and_gradient(objective, SCORES, target.to(dtype)) == loss_and_gradient(objective, SCORES, target)


@pytest.mark.parametrize("make", [lambda: torch_loss(nn.CrossEntropyLoss, {}), FocalLoss])
def test_class_156_of_unsigned_bytes_is_not_ignored_as_minus_100(make: Any) -> None:
    """In 8 bits without a sign, -100 is 156."""
    target, scores = torch.tensor([156, 3], dtype=torch.uint8), torch.randn(2, 200, generator=generator)
    objective = make()
    assert objective.checked_weight((scores, target), 2) == 2
    assert objective.metric_inputs(scores, (scores, target))[1].tolist() == [156, 3]
    assert objective.metric_mask((scores, target)).tolist() == [True, True]
    expected = make().forward(Given(), (scores, target.long())).sum
    assert torch.equal(objective.forward(Given(), (scores, target)).sum, expected)


@pytest.mark.parametrize("name", ELEMENTS)
def test_sums_of_a_model_in_half_precision_neither_overflow_nor_lose_digits(name: str) -> None:
    inputs = torch.full((300, 300), 2.0)
    target = torch.zeros(300, 300)
    for dtype in (torch.float16, torch.bfloat16):
        found, _, _ = loss_and_gradient(torch_loss(getattr(nn, name), {}), inputs, target.to(dtype), dtype)
        expected, _, _ = loss_and_gradient(torch_loss(getattr(nn, name), {}), inputs, target)
        assert found.item() == pytest.approx(expected.item(), rel=1e-6)


TEXTS = ["cat", "dog", "cat"]
THREE = torch.randn(3, 4, generator=generator)
REFUSED: list[Any] = [
    (nn.CrossEntropyLoss, THREE, TEXTS, ["class numbers", "3 texts ('cat', 'dog', 'cat')", "task: classification"]),
    (nn.CrossEntropyLoss, THREE, torch.ones(3), ["class numbers", "or probabilities", "(3,) float32"]),
    (nn.CrossEntropyLoss, THREE, torch.ones(3, 1), ["class numbers", "(3, 1) float32"]),
    (
        nn.CrossEntropyLoss,
        THREE,
        torch.ones(3, 5),
        ["(3, 4) float32", "(3, 5) float32", "need the output's shape (3, 4)"],
    ),
    (nn.CrossEntropyLoss, THREE, torch.ones(3, dtype=torch.complex64), ["class numbers", "complex64"]),
    (nn.CrossEntropyLoss, THREE, torch.tensor([0, 4, 1]), ["4 outputs, for classes 0 to 3, but a target is 4"]),
    (nn.CrossEntropyLoss, THREE, torch.zeros(3, 1, dtype=torch.int64), ["dimension of size 1", "task: classification"]),
    (nn.CrossEntropyLoss, THREE, torch.eye(4)[:3].long(), ["one-hot"]),
    (nn.NLLLoss, THREE, torch.ones(3, 4), ["NLLLoss", "class numbers", "(3, 4) float32"]),
    (nn.MultiMarginLoss, THREE, torch.ones(3), ["class numbers"]),
    (nn.MSELoss, THREE, TEXTS, ["a tensor of numbers", "3 texts"]),
    (nn.MSELoss, THREE, torch.ones(3, 4, dtype=torch.complex64), ["complex64", "imaginary"]),
    (nn.BCEWithLogitsLoss, THREE, None, ["a tensor of numbers", "NoneType"]),
    (nn.MSELoss, {"logits": THREE, "hidden": THREE}, THREE, ["dict of logits: (3, 4) float32", "model.output: logits"]),
    (nn.CrossEntropyLoss, (THREE, THREE), torch.zeros(3).long(), ["tuple of 0: (3, 4) float32", "model.output: 0"]),
]


class Returns(nn.Module):
    def __init__(self, returned: Any) -> None:
        super().__init__()
        self.returned = returned

    def forward(self, inputs: Any) -> Any:
        return self.returned


@pytest.mark.parametrize(("loss", "output", "target", "words"), REFUSED)
def test_what_does_not_fit_a_loss_is_told_in_the_users_terms(
    loss: Any, output: Any, target: Any, words: list[str]
) -> None:
    with pytest.raises(ObjectiveError) as caught:
        torch_loss(loss, {}).forward(Returns(output), (THREE, target))
    for word in words:
        assert word in str(caught.value)


def test_a_weight_asked_for_beforehand_tells_the_same() -> None:
    for target in (TEXTS, torch.ones(3)):
        with pytest.raises(ObjectiveError, match="class numbers"):
            torch_loss(nn.CrossEntropyLoss, {}).checked_weight((THREE, target), 3)
    with pytest.raises(ObjectiveError, match="class numbers"):
        NextTokenLoss().checked_weight((THREE, torch.ones(3, 4)), 3)


@pytest.mark.parametrize(
    ("loss", "output", "target", "words"),
    [
        (nn.BCEWithLogitsLoss, LOGITS, 2 * YES - 1, "one is -1: use SoftMarginLoss for -1 and 1"),
        (nn.BCEWithLogitsLoss, LOGITS, 255 * YES, "one is 255"),
        (nn.SoftMarginLoss, LOGITS, YES, "one is 0: use BCEWithLogitsLoss for 0 and 1"),
        (nn.CosineEmbeddingLoss, (SCORES, SCORES), YES, "one is 0"),
        (nn.MarginRankingLoss, (LOGITS, -LOGITS), YES, "one is 0"),
        (nn.MultiLabelSoftMarginLoss, SCORES, 3 * YES[:, None].expand(-1, 4), "one is 3"),
    ],
)
def test_targets_that_a_loss_does_not_mean_are_refused(loss: Any, output: Any, target: Tensor, words: str) -> None:
    with pytest.raises(ObjectiveError, match=words):
        torch_loss(loss, {}).metric_inputs(output, (None, target))


def test_scores_of_which_torchmetrics_would_make_probabilities_batch_by_batch_are_refused() -> None:
    pairs, truth = LOGITS.view(-1, 2), YES.long().view(-1, 2)
    for metric in (c.BinaryAccuracy(), c.BinaryAUROC(), c.MultilabelF1Score(num_labels=2)):
        with pytest.raises(EvaluationError, match="it takes probabilities"):
            measured(Own(), pairs, truth, {"m": metric}, SIZE)
    own = {"m": c.MulticlassAccuracy(4, average="micro")}  # the largest score is the most probable, whatever its scale
    assert measured(Own(), SCORES, CLASSES, own, 7)["m"] == pytest.approx(sk.accuracy_score(CLASSES, SCORES.argmax(-1)))


def test_a_complex_loss_or_result_is_told() -> None:
    class Complex(Objective):
        def forward(self, model: nn.Module, batch: Any) -> Tensor:
            return model(batch[0]).sum() * 1j

    with pytest.raises(ObjectiveError, match="Complex returned a sum in complex64"):
        TrainingModule(Given(), Complex())((LOGITS, YES))
    with pytest.raises(EvaluationError, match=r"metric 'mse' .*complex64"):
        measured(Own(), LOGITS * 1j, YES, {"mse": r.MeanSquaredError()}, SIZE)
