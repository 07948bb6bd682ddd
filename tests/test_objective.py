"""Loss sums and weights give torch's own mean on the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from runtime.errors import ObjectiveError
from runtime.objective import Loss, NextTokenLoss, Objective, TrainingModule, torch_loss

pytestmark = pytest.mark.single


class Given(nn.Module):
    """A model that returns its parameter, one row per input index."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(values)

    def forward(self, rows: Tensor) -> Tensor:
        return self.values[rows]


def mean_over_parts(objective: Objective, model: Given, target: Tensor, parts: int) -> Tensor:
    """Sum of sums over sum of weights, over uneven parts."""
    pieces = [(rows, target[rows]) for rows in torch.arange(len(target)).tensor_split(parts)]
    total = torch.stack([TrainingModule(model, objective)(piece).sum for piece in pieces]).sum()
    return total / sum(float(objective.weight(piece)) for piece in pieces)


generator = torch.Generator().manual_seed(0)
LOGITS = torch.randn(10, 4, generator=generator, dtype=torch.float64)
LABELS = torch.tensor([0, 1, 2, 3, -100, 1, -100, 0, 3, 2])
REAL = torch.randn(10, 4, generator=generator, dtype=torch.float64)
SOFT = REAL.softmax(-1)
CASES: list[tuple[str, dict[str, Any], Tensor, Tensor]] = [
    ("CrossEntropyLoss", {}, LOGITS, LABELS),
    ("CrossEntropyLoss", {"label_smoothing": 0.1}, LOGITS, LABELS),
    ("CrossEntropyLoss", {"weight": [0.5, 1.0, 2.0, 4.0]}, LOGITS, LABELS),
    (
        "CrossEntropyLoss",
        {"weight": [0.5, 1.0, 2.0, 4.0], "label_smoothing": 0.2, "ignore_index": 2},
        LOGITS,
        LABELS.clamp(0),
    ),
    ("CrossEntropyLoss", {}, LOGITS, SOFT),
    ("NLLLoss", {"weight": [0.5, 1.0, 2.0, 4.0]}, LOGITS.log_softmax(-1), LABELS),
    ("MSELoss", {}, LOGITS, REAL),
    ("L1Loss", {}, LOGITS, REAL),
    ("SmoothL1Loss", {"beta": 0.5}, LOGITS, REAL),
    ("HuberLoss", {"delta": 0.7}, LOGITS, REAL),
    ("KLDivLoss", {}, LOGITS.log_softmax(-1), SOFT),
    ("KLDivLoss", {"log_target": True}, LOGITS.log_softmax(-1), REAL.log_softmax(-1)),
    ("BCELoss", {}, LOGITS.sigmoid(), SOFT),
    ("BCEWithLogitsLoss", {"pos_weight": [1.0, 2.0, 3.0, 4.0]}, LOGITS, SOFT),
    ("SoftMarginLoss", {}, LOGITS, REAL.sign()),
    ("PoissonNLLLoss", {}, LOGITS, REAL.exp()),
]


@pytest.mark.parametrize(
    ("name", "args", "output", "target"), CASES, ids=lambda value: value if isinstance(value, str) else ""
)
@pytest.mark.parametrize("parts", [1, 3, 7])
@pytest.mark.filterwarnings("ignore:reduction. .mean. divides")  # torch warns of KLDivLoss's mean, which is meant here
def test_the_mean_over_uneven_parts_is_torchs_mean_over_the_whole(
    name: str, args: dict[str, Any], output: Tensor, target: Tensor, parts: int
) -> None:
    tensors = {key: torch.tensor(value).double() if isinstance(value, list) else value for key, value in args.items()}
    expected = getattr(nn, name)(**tensors)(output, target)
    objective = torch_loss(getattr(nn, name), args).double()
    got = mean_over_parts(objective, Given(output), target, parts)
    assert got.item() == pytest.approx(expected.item(), rel=1e-10)


def test_next_token_loss_is_the_mean_over_all_tokens_that_count() -> None:
    logits = torch.randn(3, 5, 7, dtype=torch.float64)
    target = torch.randint(0, 7, (3, 5))
    target[0, 1:] = -100
    objective = NextTokenLoss()
    expected = nn.functional.cross_entropy(logits.reshape(15, 7), target.reshape(15))
    assert mean_over_parts(objective, Given(logits), target, 3).item() == pytest.approx(expected.item(), rel=1e-10)
    assert objective.weight((None, target)) == 11


def test_a_filler_is_zero_with_zero_gradients_for_every_parameter_even_when_values_are_infinite() -> None:
    model = Given(torch.full((3, 2), float("inf")))
    module = TrainingModule(model, torch_loss(nn.MSELoss, {}))
    loss = module((torch.arange(3), torch.zeros(3, 2)), filler=True).sum
    loss.backward()
    assert loss.item() == 0
    assert model.values.grad is not None
    assert torch.equal(model.values.grad, torch.zeros(3, 2))


def test_a_loss_that_would_broadcast_is_refused() -> None:
    module = TrainingModule(Given(torch.zeros(4, 1)), torch_loss(nn.MSELoss, {}))
    with pytest.raises(ObjectiveError, match=r"\(4,\), not \(4, 1\)"):
        module((torch.arange(4), torch.zeros(4)))


def test_an_objective_that_returns_no_scalar_is_refused() -> None:
    class PerSample(Objective):
        def forward(self, model: nn.Module, batch: Any) -> Tensor:
            return model(batch).sum(-1)

    with pytest.raises(ObjectiveError, match="scalar"):
        TrainingModule(Given(torch.zeros(3, 2)), PerSample())(torch.arange(3))


@pytest.mark.parametrize("args", [{"reduction": "mean"}, {"reduction": "none"}])
def test_reduction_is_not_for_the_user(args: dict[str, Any]) -> None:
    with pytest.raises(ObjectiveError, match="reduction"):
        torch_loss(nn.MSELoss, args)


def test_what_is_no_loss_is_refused() -> None:
    with pytest.raises(ObjectiveError, match="not a loss"):
        torch_loss(nn.Linear, {})


def test_metrics_see_probabilities_whatever_the_size_of_the_logits() -> None:
    """torchmetrics normalises a batch only if some score lies outside [0, 1]; its result would depend on the cut."""
    small, large = torch.tensor([[0.1, 0.9], [0.6, 0.4]]), torch.tensor([[-3.0, 5.0], [2.0, 1.0]])
    objective = torch_loss(nn.CrossEntropyLoss, {})
    for logits in (small, large):
        probabilities, _ = objective.metric_inputs(logits, (None, torch.tensor([0, 1])))
        assert torch.allclose(probabilities, logits.softmax(-1))
    binary, _ = torch_loss(nn.BCEWithLogitsLoss, {}).metric_inputs(small, (None, torch.zeros(2, 2)))
    assert torch.allclose(binary, small.sigmoid())


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
        Weighing().checked_weight(None)


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
