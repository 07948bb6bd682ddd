"""Torch's losses by name: sums and weights give torch's own mean over the whole batch, however it is cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from runtime.data.fields import Fields
from runtime.errors import ObjectiveError
from runtime.losses.by_name import EXCLUDED, NextTokenLoss, torch_loss
from runtime.objective import Objective, TrainingModule

pytestmark = pytest.mark.single

TORCH_LOSSES = sorted({*nn.modules.loss.__all__, *(name for name in dir(nn) if "Loss" in name)})
SIZE = 10
generator = torch.Generator().manual_seed(0)


def real(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@dataclass
class Case:
    """A loss, what the model returns, and the target, for the whole batch; mean: what torch calls its reduction."""

    name: str
    outputs: Sequence[Tensor]
    target: Tensor | tuple[Tensor, ...] | None
    args: dict[str, Any] = field(default_factory=dict)
    mean: str = "mean"
    row_dim: int = 0

    def __str__(self) -> str:
        return "-".join([self.name, *self.args])

    @property
    def targets(self) -> tuple[Tensor, ...]:
        if self.target is None:
            return ()
        return self.target if isinstance(self.target, tuple) else (self.target,)

    def truth(self, outputs: Sequence[Tensor], rows: Tensor) -> Tensor:
        """Torch's own mean over the given samples, which may repeat."""
        args = {key: torch.tensor(v, dtype=torch.float64) if isinstance(v, list) else v for key, v in self.args.items()}
        loss = getattr(nn, self.name)(**args, reduction=self.mean)
        selected = [output.index_select(self.row_dim, rows) for output in outputs]
        arguments = [*selected, *[target[rows] for target in self.targets]]
        if self.name == "GaussianNLLLoss":  # (input, target, var)
            arguments = [arguments[0], arguments[2], arguments[1]]
        return loss(*arguments)

    def batch(self, rows: Tensor, weights: Tensor | None = None) -> dict[str, Tensor]:
        named = {f"target {number}": target[rows] for number, target in enumerate(self.targets)}
        return {"rows": rows, **named, **({} if weights is None else {"weight": weights[rows]})}

    def fields(self, weight: str | None = None) -> Fields:
        names = [f"target {number}" for number in range(len(self.targets))]
        return Fields(inputs="rows", target=names if len(names) > 1 else "".join(names) or None, weight=weight)


class Given(nn.Module):
    """A model that returns rows of its parameters: one tensor, or several as a tuple or by name."""

    def __init__(self, outputs: Sequence[Tensor], row_dim: int = 0, names: Sequence[str] | None = None) -> None:
        super().__init__()
        self.outputs = nn.ParameterList(output.clone() for output in outputs)
        self.row_dim, self.names = row_dim, names

    def forward(self, rows: Tensor) -> Any:
        found = tuple(output.index_select(self.row_dim, rows) for output in self.outputs)
        if self.names:
            return dict(zip(self.names, found, strict=True))
        return found[0] if len(found) == 1 else found


LOGITS, OTHER = real(SIZE, 4), real(SIZE, 4)
SOFT = OTHER.softmax(-1)
LABELS = torch.tensor([0, 1, 2, 3, -100, 1, -100, 0, 3, 2])
CLASSES = LABELS.clamp(0)
SIGNS = OTHER[:, 0].sign()
CLASS_WEIGHTS = [0.1, 1.0, 2.0, 4.7]
CASES = [
    Case("CrossEntropyLoss", [LOGITS], LABELS),
    Case("CrossEntropyLoss", [LOGITS], LABELS, {"label_smoothing": 0.1}),
    Case("CrossEntropyLoss", [LOGITS], LABELS, {"weight": CLASS_WEIGHTS}),
    Case("CrossEntropyLoss", [LOGITS], CLASSES, {"weight": CLASS_WEIGHTS, "label_smoothing": 0.2, "ignore_index": 2}),
    Case("CrossEntropyLoss", [LOGITS], SOFT),
    Case("CrossEntropyLoss", [LOGITS], SOFT, {"weight": CLASS_WEIGHTS, "label_smoothing": 0.1}),
    Case("CrossEntropyLoss", [real(SIZE, 4, 3)], torch.stack([LABELS, LABELS.roll(1), LABELS.roll(5)], 1)),
    Case("NLLLoss", [LOGITS.log_softmax(-1)], LABELS),
    Case("NLLLoss", [LOGITS.log_softmax(-1)], LABELS, {"weight": CLASS_WEIGHTS}),
    Case("MSELoss", [LOGITS], OTHER),
    Case("L1Loss", [LOGITS], OTHER),
    Case("SmoothL1Loss", [LOGITS], OTHER, {"beta": 0.5}),
    Case("HuberLoss", [LOGITS], OTHER, {"delta": 0.7}),
    Case("BCELoss", [LOGITS.sigmoid()], SOFT, {"weight": CLASS_WEIGHTS}),
    Case("BCEWithLogitsLoss", [LOGITS], SOFT),
    Case("BCEWithLogitsLoss", [LOGITS], SOFT, {"pos_weight": CLASS_WEIGHTS, "weight": [1.0, 0.3, 0.2, 0.1]}),
    Case("SoftMarginLoss", [LOGITS], OTHER.sign()),
    Case("HingeEmbeddingLoss", [LOGITS], OTHER.sign(), {"margin": 0.6}),
    Case("PoissonNLLLoss", [LOGITS], OTHER.exp(), {"full": True}),
    Case("PoissonNLLLoss", [LOGITS.exp()], OTHER.exp(), {"log_input": False}),
    Case("GaussianNLLLoss", [LOGITS, OTHER.exp()], SOFT, {"full": True}),
    Case("KLDivLoss", [LOGITS.log_softmax(-1)], SOFT, mean="batchmean"),
    Case("KLDivLoss", [LOGITS.log_softmax(-1)], OTHER.log_softmax(-1), {"log_target": True}, mean="batchmean"),
    Case("KLDivLoss", [real(SIZE, 3, 4).log_softmax(-1)], real(SIZE, 3, 4).softmax(-1), mean="batchmean"),
    Case("MultiMarginLoss", [LOGITS], CLASSES, {"weight": CLASS_WEIGHTS, "margin": 0.4}),
    Case("MultiLabelMarginLoss", [LOGITS], torch.tensor([[2, 0, -1, 1], [3, -1, 0, 0]]).repeat(SIZE // 2, 1)),
    Case("MultiLabelSoftMarginLoss", [LOGITS], (OTHER > 0).double(), {"weight": CLASS_WEIGHTS}),
    Case("CosineEmbeddingLoss", [LOGITS, OTHER], SIGNS, {"margin": 0.2}),
    Case("MarginRankingLoss", [LOGITS, OTHER], LOGITS.roll(1).sign(), {"margin": 0.2}),
    Case("TripletMarginLoss", [LOGITS, OTHER, real(SIZE, 4)], None, {"swap": True}),
    Case("TripletMarginWithDistanceLoss", [LOGITS, OTHER, real(SIZE, 4)], None, {"distance_function": F.l1_loss}),
    Case(
        "CTCLoss",
        [real(12, SIZE, 5).log_softmax(-1)],
        (torch.randint(1, 5, (SIZE, 4)), torch.arange(12 - SIZE, 12) + 1, torch.arange(SIZE) % 4 + 1),
        {"zero_infinity": True},
        row_dim=1,
    ),
]
CASES[-2].args["distance_function"] = lambda first, second: (first - second).abs().sum(-1)
# Whole numbers: a sample of weight 2 counts as if it were there twice, one of weight 0 as if it were not.
WEIGHTS = torch.tensor([1, 2, 0, 3, 1, 1, 2, 0, 1, 2])


def one_number(weight: float | tuple[float, ...]) -> float:
    assert not isinstance(weight, tuple)
    return weight


def mean_over_parts(case: Case, objective: Objective, model: Given, parts: int, weights: Tensor | None) -> Tensor:
    """Sum of sums over sum of weights, over uneven parts."""
    module = TrainingModule(model, objective)
    batches = [case.batch(rows, weights) for rows in torch.arange(SIZE).tensor_split(parts)]
    total = torch.stack([module(batch).sum for batch in batches]).sum()
    weight = sum(one_number(objective.checked_weight(batch, len(batch["rows"]))) for batch in batches)
    assert isinstance(weight, float)
    return total / weight


def gradients(loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, parameters, materialize_grads=True))


@pytest.mark.parametrize("name", TORCH_LOSSES)
def test_every_loss_of_torch_is_an_objective_or_excluded_with_a_reason(name: str) -> None:
    cases = [case for case in CASES if case.name == name]
    assert bool(cases) != (name in EXCLUDED)
    if name in EXCLUDED:
        with pytest.raises(ObjectiveError) as refused:
            torch_loss(getattr(nn, name), {})
        assert EXCLUDED[name] in str(refused.value)


def test_no_exclusion_is_of_a_loss_that_torch_has_not() -> None:
    newer = {"LinearCrossEntropyLoss"}  # which torch 2.11 has not yet
    assert set(EXCLUDED) - newer <= set(TORCH_LOSSES)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("parts", [1, 3, 7])
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["equal", "weighted"])
def test_loss_and_gradient_over_uneven_parts_are_torchs_over_the_whole(
    case: Case, parts: int, weights: Tensor | None
) -> None:
    objective = torch_loss(getattr(nn, case.name), case.args)
    objective.fields = case.fields("weight" if weights is not None else None)
    model = Given(case.outputs, case.row_dim)
    rows = torch.arange(SIZE) if weights is None else torch.arange(SIZE).repeat_interleave(weights)
    expected = case.truth(list(model.outputs), rows)
    got = mean_over_parts(case, objective, model, parts, weights)
    assert got.item() == pytest.approx(expected.item(), rel=1e-12)
    wanted = gradients(expected, list(model.outputs))
    for found, true in zip(gradients(got, list(model.outputs)), wanted, strict=True):
        torch.testing.assert_close(found, true, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("case", [case for case in CASES if len(case.outputs) > 1], ids=str)
def test_what_a_loss_takes_several_of_may_have_names(case: Case) -> None:
    objective = torch_loss(getattr(nn, case.name), case.args)
    objective.fields = case.fields()
    names = tuple(cast("Any", objective).outputs)[::-1]
    model = Given(case.outputs[::-1], names=names)
    expected = case.truth(case.outputs, torch.arange(SIZE))
    assert mean_over_parts(case, objective, model, 2, None).item() == pytest.approx(expected.item(), rel=1e-12)
    with pytest.raises(ObjectiveError, match=f"takes {len(names)} tensors .*{names[-1]}"):
        TrainingModule(Given(case.outputs[:1]), objective)(case.batch(torch.arange(2)))


@pytest.mark.parametrize("name", ["GaussianNLLLoss", "MultiMarginLoss", "MSELoss", "CrossEntropyLoss"])
@pytest.mark.parametrize("shape", [(SIZE, 1), (SIZE, 1, 1)])
def test_sample_weights_may_be_a_column(name: str, shape: tuple[int, ...]) -> None:
    case = next(case for case in CASES if case.name == name)
    objective = torch_loss(getattr(nn, name), case.args)
    objective.fields = case.fields("weight")
    model = Given(case.outputs)
    flat = mean_over_parts(case, objective, model, 2, WEIGHTS.double())
    column = mean_over_parts(case, objective, model, 2, WEIGHTS.double().view(shape))
    assert column.item() == pytest.approx(flat.item(), rel=1e-12)


def test_each_element_may_have_a_weight_of_its_own() -> None:
    case = next(case for case in CASES if case.name == "MSELoss")
    weights = real(SIZE, 4).abs()
    objective = torch_loss(nn.MSELoss, {})
    objective.fields = case.fields("weight")
    expected = (weights * (LOGITS - OTHER).square()).sum() / weights.sum()
    assert mean_over_parts(case, objective, Given([LOGITS]), 3, weights).item() == pytest.approx(expected.item())


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (torch.ones(3), r"shape \(3,\), but the losses have \(4, 2\)"),
        (torch.ones(4, 3), r"shape \(4, 3\)"),
        (torch.tensor([1.0, -1.0, 1.0, 1.0]), "negative"),
        (torch.tensor([1.0, float("nan"), 1.0, 1.0]), "NaN"),
        ("heavy", "must be a tensor"),
    ],
)
def test_weights_that_make_no_sense_are_refused(weights: Any, words: str) -> None:
    objective = torch_loss(nn.MSELoss, {})
    objective.fields = Fields(inputs=0, target=1, weight=2)
    with pytest.raises(ObjectiveError, match=words):
        objective.checked_weight((None, torch.zeros(4, 2), weights), 4)


@pytest.mark.parametrize("shift", [False, True])
def test_next_token_loss_is_the_mean_over_all_tokens_that_count(shift: bool) -> None:
    logits, target = real(3, 5, 7), torch.randint(0, 7, (3, 5), generator=generator)
    target[0, 2:] = -100
    objective = NextTokenLoss(shift=shift)
    case = Case("CrossEntropyLoss", [logits], target)
    batches = [case.batch(rows) for rows in torch.arange(3).tensor_split(2)]
    objective.fields = case.fields()
    module = TrainingModule(Given([logits]), objective)
    weight = sum(one_number(objective.checked_weight(batch, 1)) for batch in batches)
    inputs, following = (logits[:, :-1], target[:, 1:]) if shift else (logits, target)
    expected = F.cross_entropy(inputs.reshape(-1, 7), following.reshape(-1))
    assert weight == (following != -100).sum()
    assert sum(module(batch).sum for batch in batches).item() / weight == pytest.approx(expected.item(), rel=1e-12)
    (probabilities, tokens) = objective.metric_inputs(logits, case.batch(torch.arange(3)))
    assert torch.equal(tokens, following[following != -100])
    torch.testing.assert_close(probabilities, inputs[following != -100].softmax(-1))
    # Sentences may be weighted, too.
    objective.fields = case.fields("weight")
    weighted = case.batch(torch.arange(3), torch.tensor([0, 2, 1]))
    repeated = torch.tensor([1, 1, 2])
    expected = F.cross_entropy(inputs[repeated].reshape(-1, 7), following[repeated].reshape(-1))
    got = module(weighted).sum / objective.checked_weight(weighted, 3)
    assert got.item() == pytest.approx(expected.item(), rel=1e-12)
    assert torch.equal(objective.metric_inputs(logits, weighted)[1], following[1:][following[1:] != -100])


def test_class_weights_are_no_state_of_the_run() -> None:
    objective = torch_loss(nn.CrossEntropyLoss, {"weight": CLASS_WEIGHTS})
    assert not list(objective.buffers())
    assert not objective.state_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_class_weights_follow_the_models_type(dtype: torch.dtype) -> None:
    objective = torch_loss(nn.BCEWithLogitsLoss, {"pos_weight": CLASS_WEIGHTS})
    loss = TrainingModule(Given([LOGITS.to(dtype)]), objective)((torch.arange(SIZE), SOFT.to(dtype))).sum
    pos_weight = torch.tensor(CLASS_WEIGHTS, dtype=dtype)
    expected = F.binary_cross_entropy_with_logits(
        LOGITS.to(dtype), SOFT.to(dtype), pos_weight=pos_weight, reduction="sum"
    )
    assert torch.equal(loss, expected)


def test_under_autocast_class_weights_are_not_rounded_to_half_precision() -> None:
    objective = torch_loss(nn.CrossEntropyLoss, {"weight": CLASS_WEIGHTS})
    with torch.autocast("cpu", torch.bfloat16):
        loss = TrainingModule(Given([LOGITS.bfloat16()]), objective)((torch.arange(SIZE), LABELS)).sum
    expected = F.cross_entropy(LOGITS.bfloat16().float(), LABELS, torch.tensor(CLASS_WEIGHTS), reduction="sum")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


REFUSED: list[tuple[Any, dict[str, Any], Tensor, Tensor, str]] = [
    (nn.MSELoss, {}, torch.zeros(4, 1), torch.zeros(4), r"\(4,\), not \(4, 1\).*broadcast"),
    (nn.KLDivLoss, {}, torch.zeros(4, 2), torch.zeros(2), "needs an output of the target's shape"),
    (nn.MultiMarginLoss, {}, torch.zeros(4, 2, 2), torch.zeros(4).long(), r"\(batch, dim\)"),
    (nn.CrossEntropyLoss, {}, torch.zeros(4, 2), torch.zeros(3).long(), "refused the model's output"),
    (nn.CrossEntropyLoss, {}, torch.zeros(4, 6, 3), torch.zeros(4, 6).long(), "NextTokenLoss takes classes last"),
    (nn.CTCLoss, {}, torch.zeros(4, 2, 3), torch.zeros(2, 3).long(), "three parts of the batch"),
    (nn.GaussianNLLLoss, {}, torch.zeros(4, 2), torch.zeros(4, 2), "takes 2 tensors .*input, var"),
]


@pytest.mark.parametrize(("loss", "args", "output", "target", "words"), REFUSED)
def test_outputs_and_targets_that_do_not_fit_are_refused(
    loss: Any, args: dict[str, Any], output: Tensor, target: Tensor, words: str
) -> None:
    module = TrainingModule(Given([output]), torch_loss(loss, args))
    with pytest.raises(ObjectiveError, match=words):
        module((torch.arange(len(output)), target))


def test_a_target_of_a_class_without_weight_is_named() -> None:
    objective = torch_loss(nn.CrossEntropyLoss, {"weight": [1.0, 2.0]})
    for target in (2, -1):
        with pytest.raises(ObjectiveError, match=f"weights for 2 classes, but a target is {target}"):
            objective.checked_weight((None, torch.tensor([0, target, 1])), 3)


@pytest.mark.parametrize("key", ["reduction", "size_average", "reduce"])
def test_reduction_is_not_for_the_user(key: str) -> None:
    with pytest.raises(ObjectiveError, match=key):
        torch_loss(nn.MSELoss, {key: "none"})


def test_what_is_no_loss_is_refused() -> None:
    with pytest.raises(ObjectiveError, match="not a loss"):
        torch_loss(nn.Linear, {})


class Doubled(nn.MSELoss):
    """A user's own variant of one of torch's."""

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return 2 * super().forward(output, target)


def test_a_users_variant_of_a_loss_of_torch_is_one_of_its_kind() -> None:
    loss = TrainingModule(Given([LOGITS]), torch_loss(Doubled, {}))((torch.arange(SIZE), OTHER)).sum
    assert loss.item() == pytest.approx(2 * (LOGITS - OTHER).square().sum().item())


# What metrics are given: (loss, args, output, target, expected predictions, expected target)
ROW, ONES = torch.tensor([[0.2, -1.0, 3.0]]), torch.tensor([[1.0, 0.0, 1.0]])
SHOWN: list[Any] = [
    (nn.BCEWithLogitsLoss, {}, ROW, ONES, ROW.sigmoid(), ONES.long()),
    (nn.BCELoss, {}, ROW.sigmoid(), ONES, ROW.sigmoid(), ONES.long()),
    (nn.SoftMarginLoss, {}, ROW, 2 * ONES - 1, ROW.sigmoid(), ONES.long()),
    (nn.CrossEntropyLoss, {}, ROW, torch.tensor([1]), ROW.softmax(-1), torch.tensor([1])),
    (nn.CrossEntropyLoss, {}, ROW, torch.tensor([[0.1, 0.7, 0.2]]), ROW.softmax(-1), torch.tensor([1])),
    (nn.NLLLoss, {}, ROW.log_softmax(-1), torch.tensor([1]), ROW.softmax(-1), torch.tensor([1])),
    (nn.MultiMarginLoss, {}, ROW, torch.tensor([1]), ROW.softmax(-1), torch.tensor([1])),
    (nn.MultiLabelSoftMarginLoss, {}, ROW, ONES, ROW.sigmoid(), ONES.long()),
    (nn.MultiLabelMarginLoss, {}, ROW, torch.tensor([[2, 0, -1]]), ROW.sigmoid(), ONES.long()),
    (nn.MultiLabelMarginLoss, {}, ROW, torch.tensor([[2, -1, 1]]), ROW.sigmoid(), torch.tensor([[0, 0, 1]])),
    (nn.PoissonNLLLoss, {}, ROW, ONES, ROW.exp(), ONES),
    (nn.PoissonNLLLoss, {"log_input": False}, ROW, ONES, ROW, ONES),
    (nn.KLDivLoss, {"log_target": True}, ROW, -ONES, ROW.exp(), (-ONES).exp()),
    (nn.MSELoss, {}, ROW, ONES, ROW, ONES),
    (nn.GaussianNLLLoss, {}, (ROW, ROW.exp()), ONES, ROW, ONES),
    (nn.MarginRankingLoss, {}, (ROW, -ROW), 2 * ONES - 1, (2 * ROW).sigmoid(), ONES.long()),
    (nn.CosineEmbeddingLoss, {}, (ROW, -2 * ROW), -torch.ones(1), torch.zeros(1), torch.tensor([0])),
    (nn.CosineEmbeddingLoss, {}, (ROW, 2 * ROW), torch.ones(1), torch.ones(1), torch.tensor([1])),
]


@pytest.mark.parametrize(("loss", "args", "output", "target", "predictions", "truth"), SHOWN)
def test_metrics_see_probabilities_and_classes(
    loss: Any, args: dict[str, Any], output: Any, target: Tensor, predictions: Tensor, truth: Tensor
) -> None:
    found, true = torch_loss(loss, args).metric_inputs(output, (None, target))
    torch.testing.assert_close(found, predictions)
    assert torch.equal(true, truth)


@pytest.mark.parametrize(
    ("loss", "output", "target"),
    [
        (nn.MSELoss, LOGITS, OTHER),
        (nn.CrossEntropyLoss, LOGITS, CLASSES),
        (nn.CrossEntropyLoss, LOGITS, SOFT),
        (nn.BCEWithLogitsLoss, LOGITS[:, :1], OTHER[:, :1].sign().clamp(0)),
        (nn.TripletMarginLoss, (LOGITS, OTHER, SOFT), None),
    ],
)
def test_metrics_leave_out_what_has_no_weight(loss: Any, output: Any, target: Tensor | None) -> None:
    counted = WEIGHTS != 0
    plain = torch_loss(loss, {}).metric_inputs(output, (None, target))
    objective = torch_loss(loss, {})
    objective.fields = Fields(inputs=0, target=1, weight=2)
    for found, whole in zip(objective.metric_inputs(output, (None, target, WEIGHTS)), plain, strict=True):
        torch.testing.assert_close(found, whole[counted])


def test_metrics_see_probabilities_whatever_the_size_of_the_logits() -> None:
    """torchmetrics normalises a batch only if some score lies outside [0, 1]; its result would depend on the cut."""
    small, large = torch.tensor([[0.1, 0.9], [0.6, 0.4]]), torch.tensor([[-3.0, 5.0], [2.0, 1.0]])
    objective = torch_loss(nn.CrossEntropyLoss, {})
    for logits in (small, large):
        probabilities, _ = objective.metric_inputs(logits, (None, torch.tensor([0, 1])))
        assert torch.allclose(probabilities, logits.softmax(-1))
