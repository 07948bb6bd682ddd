"""The sum over two sets of samples is the sum over both: means, couplings and padding are found; good losses are left alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from torch import Tensor, nn
from torch.utils.data import IterableDataset, TensorDataset

from runtime import cli
from runtime.checks.objective import SampleSets, deviations
from runtime.errors import ConfigurationError
from runtime.losses.by_name import torch_loss
from runtime.losses.weighted_sum import WeightedSum
from runtime.objective import Loss, Objective, TrainingModule
from runtime.session import train
from tests.process_pool import ProcessPool

HERE = "tests.test_additivity"
CPU = torch.device("cpu")


class Net(nn.Sequential):
    """With all that is random or depends on the batch in training."""

    def __init__(self, dtype: str = "float32") -> None:
        layers = nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 4)
        super().__init__(*layers)
        self.to(getattr(torch, dtype))


class Squares(Objective):
    """The base of what follows, and right itself."""

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        return (model(batch[0]) - batch[1].unsqueeze(-1)).square().mean(-1)

    def forward(self, model: nn.Module, batch: Any) -> Loss | Tensor:
        return self.losses(model, batch).sum()


class Mean(Squares):
    def forward(self, model: nn.Module, batch: Any) -> Loss | Tensor:
        return self.losses(model, batch).mean()


class WeightedMean(Squares):
    """A mean over what counts, of which sets have different numbers."""

    def weight(self, batch: Any) -> float | Tensor:
        return (batch[1] % 3 + 1).sum()

    def forward(self, model: nn.Module, batch: Any) -> Loss | Tensor:
        return (self.losses(model, batch) * (batch[1] % 3 + 1)).sum() / self.weight(batch)


class Weighted(WeightedMean):
    def forward(self, model: nn.Module, batch: Any) -> Loss | Tensor:
        return (self.losses(model, batch) * (batch[1] % 3 + 1)).sum()


class Contrastive(Objective):
    def forward(self, model: nn.Module, batch: Any) -> Loss | Tensor:
        values = nn.functional.normalize(model(batch[0]), dim=-1)
        return nn.functional.cross_entropy(values @ values.T, torch.arange(len(values)), reduction="sum")


class Told(Contrastive):
    couples_samples = True


class Centred(Squares):
    """Takes the microbatch's mean away."""

    def forward(self, model: nn.Module, batch: Any) -> Loss | Tensor:
        losses = self.losses(model, batch)
        return (losses - losses.mean()).square().sum()


class OfOneWeight(Squares):
    """Every microbatch weighs the same."""

    def weight(self, batch: Any) -> float | Tensor:
        return 1.0


class MeanOfOneWeight(Mean, OfOneWeight):
    """Right where all slots have as many samples."""


class PenaltyOnWeights(Squares):
    def forward(self, model: nn.Module, batch: Any) -> Loss | Tensor:
        return self.losses(model, batch).sum() + sum(p.square().sum() for p in model.parameters())


class Noisy(Squares):
    """Draws random numbers in evaluation, too."""

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        return super().losses(model, (batch[0] + 0.1 * torch.randn_like(batch[0]), batch[1]))


class NoisyMean(Noisy, Mean):
    pass


class InParts(Squares):
    def forward(self, model: nn.Module, batch: Any) -> Loss | Tensor:
        losses = self.losses(model, batch)
        return Loss(losses.sum(), {"largest": losses.detach().amax(), "half": losses.detach().sum() / 2})


class Signed(Squares):
    """Samples' losses have both signs, and nearly cancel."""

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        sign = 1 - 2 * (torch.arange(len(batch[0])) % 2)
        return 1000 * sign + 1e-3 * super().losses(model, batch)


class Penalised(Squares):
    """Needs the gradient of its input."""

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        inputs = batch[0].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model(inputs).sum(), inputs, create_graph=True)
        return super().losses(model, batch) + gradient.square().sum(-1)


class Counting(Squares):
    """Keeps a buffer of what it has seen, in evaluation, too."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, model: nn.Module, batch: Any) -> Loss | Tensor:
        self.seen += len(batch[0])
        torch.rand(3)
        return super().forward(model, batch)


class Unable(Squares):
    """Cannot take few samples."""

    def forward(self, model: nn.Module, batch: Any) -> Loss | Tensor:
        if len(batch[0]) < 8:
            raise ValueError("too few")
        return super().forward(model, batch)


def points(size: int = 48, dtype: str = "float32") -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(size, 6, generator=generator, dtype=torch.float64)
    return TensorDataset(inputs.to(getattr(torch, dtype)), torch.arange(size) % 4)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(points())


class SharedStream(IterableDataset[Any]):
    """Gives each rank samples of its own."""

    def __iter__(self) -> Any:
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        return iter([points()[i] for i in range(rank, 48, ranks)])


def sets(dtype: torch.dtype, *, target: Callable[[Tensor], Tensor] = lambda t: t) -> SampleSets:
    inputs, numbers = (tensor[:8] for tensor in points().tensors)
    batch = (inputs.to(dtype), target(numbers))
    first, second = tuple(t[:4] for t in batch), tuple(t[4:] for t in batch)
    return SampleSets(
        first, second, batch, (4, 4), lambda: iter([tuple(t[i : i + 1] for t in batch) for i in range(8)])
    )


def found(objective: Objective, dtype: torch.dtype = torch.float32, **options: Any) -> list[tuple[str, str, bool]]:
    torch.manual_seed(0)
    module = TrainingModule(Net().to(dtype), objective)
    return [(d.of, d.part, d.is_mean) for d in deviations(module, sets(dtype, **options), device=CPU)]


TYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("right", [Squares, Weighted, Noisy, Penalised, Counting, Unable, Signed])
def test_a_sum_over_samples_is_left_alone_in_every_precision(right: type[Objective], dtype: torch.dtype) -> None:
    if right is Signed and dtype == torch.bfloat16:
        pytest.skip("nothing is left of it there")
    assert found(right(), dtype) == []


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("mean", [Mean, WeightedMean, NoisyMean])
def test_a_mean_is_recognised_in_every_precision(mean: type[Objective], dtype: torch.dtype) -> None:
    assert found(mean(), dtype) == [("sum", "", True)]


@pytest.mark.parametrize(
    ("coupling", "dtype"),
    [*((Contrastive, dtype) for dtype in TYPES), (Centred, torch.float64), (Centred, torch.float32)],
    ids=str,
)
def test_a_loss_that_couples_samples_is_found(coupling: type[Objective], dtype: torch.dtype) -> None:
    assert found(coupling(), dtype) == [("sum", "", False)]


def test_a_weight_and_a_part_that_are_no_sums_are_found() -> None:
    assert found(OfOneWeight()) == [("weight", "", False)]
    assert found(InParts()) == [("largest", "", False)]


@pytest.mark.parametrize(
    ("loss", "target"),
    [
        (nn.CrossEntropyLoss, lambda t: t),
        (nn.MSELoss, lambda t: nn.functional.one_hot(t, 4).float()),
        (nn.L1Loss, lambda t: nn.functional.one_hot(t, 4).float()),
        (nn.BCEWithLogitsLoss, lambda t: nn.functional.one_hot(t, 4).float()),
        (nn.KLDivLoss, lambda t: nn.functional.one_hot(t, 4).float()),
        (nn.MultiMarginLoss, lambda t: t),
        (nn.MultiLabelSoftMarginLoss, lambda t: nn.functional.one_hot(t, 4).float()),
    ],
)
def test_losses_of_torch_are_left_alone(loss: type[nn.Module], target: Any) -> None:
    assert found(torch_loss(loss, {}), target=target) == []


def test_of_several_losses_the_one_that_is_wrong_is_named() -> None:
    several = {"right": Squares(), "mean": Mean(), "coupled": Contrastive()}
    assert found(WeightedSum(several, dict.fromkeys(several, 0.5))) == [
        ("sum", "mean", True),
        ("sum", "coupled", False),
    ]


@pytest.mark.parametrize("objective", [Counting, Squares, Unable, Penalised])
def test_the_check_leaves_no_trace(objective: type[Objective]) -> None:
    module = TrainingModule(Net(), objective())
    module.model.get_submodule("1").eval()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    modes, random = [part.training for part in module.modules()], torch.get_rng_state()
    deviations(module, sets(torch.float32), device=CPU)
    assert [part.training for part in module.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())


# In a run


def configuration(folder: Path, objective: Any, **changes: Any) -> dict[str, Any]:
    return {
        "output": str(folder / "run"),
        "model": f"{HERE}:Net",
        "data": {"train": f"{HERE}:points"},
        "batch": {"global_size": 16, "slots": 2},
        "objective": objective if isinstance(objective, dict) else f"{HERE}:{objective}",
        "optimizer": {"target": "SGD", "args": {"lr": 0.01}},
        "limit": {"steps": 2},
        **changes,
    }


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def warnings_of(folder: Path) -> list[str]:
    return [r["text"] for r in records(folder) if r["event"] == "message" and "objective" in r["text"]]


def inexact(folder: Path) -> list[str]:
    starts = [record for record in records(folder) if record["event"] == "start"]
    return list(starts[-1]["inexact"])


@pytest.mark.parametrize("data", [f"{HERE}:points", {"target": f"{HERE}:Stream", "sharded_by": "runtime"}], ids=str)
def test_a_mean_is_refused_before_the_first_step_with_the_cure(tmp_path: Path, data: Any) -> None:
    path = tmp_path / "mean.yaml"
    path.write_text(yaml.safe_dump(configuration(tmp_path, "Mean", data={"train": data})))
    with pytest.raises(ConfigurationError, match=r"returns a mean, not a sum.*return the sum") as caught:
        train(path)
    assert str(caught.value).startswith(f"{path}:")
    assert "objective" in str(caught.value).split(": ")[0]
    assert train(path, "checks=off").step == 2


def test_a_mean_among_several_losses_is_refused_by_its_key(tmp_path: Path) -> None:
    losses = {"one": {"target": f"{HERE}:Squares"}, "two": {"target": f"{HERE}:Mean"}}
    with pytest.raises(ConfigurationError, match=r"objective\.losses\.two\.target: .* returns a mean"):
        train(configuration(tmp_path, {"losses": losses}))


def test_a_coupling_is_told_in_one_line_and_listed_as_inexact_after_a_resumption_too(tmp_path: Path) -> None:
    train(configuration(tmp_path, "Contrastive"))
    (line,) = warnings_of(tmp_path)
    assert "depends on the others of its microbatch" in line
    assert "couples_samples = True" in line
    assert "\n" not in line
    (first,) = inexact(tmp_path)
    assert "couples the samples of a slot" in first
    train(configuration(tmp_path, "Contrastive", limit={"steps": 3}))
    assert inexact(tmp_path) == [first]
    assert len(warnings_of(tmp_path)) == 1


def test_a_mean_of_weight_1_for_each_microbatch_is_told_as_what_it_is(tmp_path: Path) -> None:
    train(configuration(tmp_path, "MeanOfOneWeight"))
    (line,) = warnings_of(tmp_path)
    assert "the weight of" in line and "is not a sum over its samples" in line


def test_a_penalty_added_once_for_each_microbatch_is_told_with_its_cure(tmp_path: Path) -> None:
    train(configuration(tmp_path, "PenaltyOnWeights"))
    (line,) = warnings_of(tmp_path)
    assert "(a penalty on weights) by the number of samples" in line


@pytest.mark.parametrize("silent", ["Told", "Squares", "Noisy", "Counting"])
def test_what_is_declared_or_right_is_not_warned_of(tmp_path: Path, silent: str) -> None:
    train(configuration(tmp_path, silent))
    assert warnings_of(tmp_path) == []
    assert bool(inexact(tmp_path)) == (silent == "Told")


@pytest.mark.parametrize(("objective", "said"), [("Contrastive", "couples the samples"), ("Mean", "returns a mean")])
def test_show_says_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str], objective: str, said: str) -> None:
    path = tmp_path / "shown.yaml"
    path.write_text(yaml.safe_dump(configuration(tmp_path, objective)))
    assert cli.main(["show", str(path)]) == (2 if objective == "Mean" else 0)
    told = capsys.readouterr()
    assert said in " ".join((told.out + told.err).split())


def _started(configuration: dict[str, Any]) -> str:
    try:
        return train(configuration).outcome
    except ConfigurationError as error:
        return str(error)


SHARED = {"train": {"target": f"{HERE}:SharedStream", "sharded_by": "dataset"}, "drop_last": True}


@pytest.mark.parametrize("data", [{"train": f"{HERE}:points"}, SHARED], ids=["mapped", "shared out by the data set"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_all_ranks_refuse_a_mean_alike(pool: ProcessPool, tmp_path: Path, kind: str, data: dict[str, Any]) -> None:
    changes: dict[str, Any] = {"strategy": {"kind": kind}, "data": data, "limit": {"steps": 1}}
    told = pool.run(_started, 2, configuration=configuration(tmp_path, "Mean", **changes))
    assert told[0] == told[1]
    assert "returns a mean" in told[0]
    coupled = configuration(tmp_path / "coupled", "Contrastive", **changes)
    assert pool.run(_started, 2, configuration=coupled) == ["finished", "finished"]
    assert len(warnings_of(tmp_path / "coupled")) == 1
