"""Every kind of loss, from a YAML's keys to the update: that of torch's own mean over the whole batch, in float64 to 1e-10."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from runtime.losses.by_name import EXCLUDED
from tests.observed import configuration
from tests.process_pool import ProcessPool
from tests.test_accumulation import TOLERANCE, batches_of, initial, plain_update, relative_difference
from tests.test_losses import TORCH_LOSSES

ALONE = pytest.mark.single
LR = 0.2


@dataclass
class Task:
    """A loss as the YAML says it, and torch's mean of it."""

    objective: str
    target: str | list[str] | None = None
    args: dict[str, Any] = field(default_factory=dict)
    form: str = "plain"
    truth: Callable[[Any, Any], Tensor] | None = None  # of the model's output and the batch; default: torch's mean

    def __str__(self) -> str:
        return "-".join([self.objective, *self.args, *([self.target] if isinstance(self.target, str) else [])])

    def section(self, folder: Path, slots: int, weight: str | None) -> dict[str, Any]:
        fields = {"inputs": "inputs", "target": self.target, "weight": weight}
        return configuration(
            folder,
            model={"target": "tiny_tasks:Heads", "args": {"form": self.form}},
            data={"train": {"target": "tiny_tasks:rows"}, "fields": fields},
            objective={"target": self.objective, "args": self.args},
            optimizer={"target": "SGD", "args": {"lr": LR}},
            batch={"global_size": 16, "slots": slots},
            limit={"steps": 3},  # of 16, 16 and 8 samples
            reporting={"every": "100 steps", "progress": False},
        )

    def mean(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        output = model(batch["inputs"])
        if self.truth is not None:
            return self.truth(output, batch)
        args = {key: torch.tensor(v, dtype=torch.float64) if isinstance(v, list) else v for key, v in self.args.items()}
        if "distance_function" in args:
            args["distance_function"] = lambda first, second: (first - second).abs().sum(-1)
        names = self.target if isinstance(self.target, list) else [self.target] if self.target else []
        outputs = output if isinstance(output, tuple) else (output,)
        loss = getattr(nn, self.objective)(**args, reduction="batchmean" if self.objective == "KLDivLoss" else "mean")
        return loss(*outputs, *[batch[name] for name in names])


def focal(logits: Tensor, batch: Any) -> Tensor:
    cross_entropy = F.cross_entropy(logits, batch["label"], reduction="none")
    return (cross_entropy * (1 - (-cross_entropy).exp()) ** 2).sum() / (batch["label"] != -100).sum()


CLASS_WEIGHTS = [0.1, 1.0, 2.0, 4.7]
TASKS = [
    Task("CrossEntropyLoss", "label", {"label_smoothing": 0.1}),
    Task("CrossEntropyLoss", "label", {"weight": CLASS_WEIGHTS}),
    Task("CrossEntropyLoss", "class", {"ignore_index": 2}),
    Task("CrossEntropyLoss", "soft", {"weight": CLASS_WEIGHTS}),
    Task("CrossEntropyLoss", "pixels", form="pixels"),
    Task("NLLLoss", "label", {"weight": CLASS_WEIGHTS}, "log"),
    Task("MSELoss", "real"),
    Task("L1Loss", "real"),
    Task("SmoothL1Loss", "real", {"beta": 0.5}),
    Task("HuberLoss", "real", {"delta": 0.5}),
    Task("BCELoss", "soft", form="sigmoid"),
    Task("BCEWithLogitsLoss", "binary", {"pos_weight": CLASS_WEIGHTS, "weight": [1.0, 0.3, 0.2, 0.1]}),
    Task("SoftMarginLoss", "signs"),
    Task("HingeEmbeddingLoss", "signs"),
    Task("PoissonNLLLoss", "count"),
    Task(
        "GaussianNLLLoss",
        "real",
        form="gauss",
        truth=lambda out, b: F.gaussian_nll_loss(out["input"], b["real"], out["var"]),
    ),
    Task("KLDivLoss", "soft", form="log"),
    Task("MultiMarginLoss", "class", {"weight": CLASS_WEIGHTS}),
    Task("MultiLabelMarginLoss", "listed"),
    Task("MultiLabelSoftMarginLoss", "binary"),
    Task("CosineEmbeddingLoss", "sign", form="pair"),
    Task("MarginRankingLoss", "signs", {"margin": 0.3}, "pair"),
    Task("TripletMarginLoss", None, form="triple"),
    Task("TripletMarginWithDistanceLoss", None, {"distance_function": {"target": "tiny_tasks:distance"}}, "triple"),
    Task("CTCLoss", ["letters", "frames", "length"], form="sequence"),
    Task("FocalLoss", "label", truth=focal),
]


def train_all(configs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Take each configuration's steps with the parts of a run, but without its folder, which takes ten times as long."""
    from runtime.build.builder import Builder
    from runtime.config import component
    from runtime.config.file import load
    from runtime.config.strategy import DDPSection
    from runtime.data.batches import Cursor, SlotAssignment
    from runtime.data.loading import read_here
    from runtime.data.samples import Samples
    from runtime.data.training_data import MappedData, ReadOptions
    from runtime.distributed.collectives import begin_sum_over_ranks
    from runtime.objective import TrainingModule
    from runtime.strategies.ddp import DDPStrategy

    def new_strategy() -> DDPStrategy:
        return DDPStrategy(precision="fp32", options=DDPSection())

    group, found = new_strategy(), []
    for config in configs:
        loaded = load(config)
        component.add_code_folder(loaded.code)
        builder = Builder(loaded)
        module = TrainingModule(builder.model(), builder.objective())
        samples, strategy = builder.samples("train", batch_size=16), new_strategy()
        assert isinstance(samples, Samples)
        strategy.prepare(module, builder.optimizer(module), slots=loaded.values.batch.slots or 1)
        how = ReadOptions(
            assignment=SlotAssignment(loaded.values.batch.slots or 1, strategy.world_size, strategy.rank),
            make_loader=read_here,
            num_workers=0,
            weigh=None if module.objective.counts_samples else module.objective.checked_weight,
            num_weights=module.objective.num_weights,
            begin_sum=lambda weights: begin_sum_over_ranks(weights, group.device),
        )
        data = MappedData(samples, builder.order(samples.source))
        stop = lambda cursor, steps: steps >= 3  # noqa: E731
        for window in data.read(how, start=Cursor(), stop=stop, skipped=(), reader_states={}).windows:
            for number, microbatch in enumerate(window.microbatches, start=1):
                with strategy.microbatch(slot=microbatch.slot, last=number == len(window.microbatches)):
                    loss = strategy.forward(microbatch.batch, filler=microbatch.filler)
                    strategy.backward(loss.sum, weight=window.weight or 1.0)
            strategy.step(None, measure_norm=False)
        found.append({name: value.clone().numpy() for name, value in module.model.state_dict().items()})
        strategy.close()
    group.close()
    return found


def test_the_grid_has_every_loss_of_torch() -> None:
    of_torch = {task.objective for task in TASKS if hasattr(torch.nn, task.objective)}  # the others are our own
    assert set(TORCH_LOSSES) - set(EXCLUDED) == of_torch


def repeated(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch in which each sample is there as often as its weight says."""
    return {name: column.repeat_interleave(batch["trust"], dim=0) for name, column in batch.items()}


@cache
def truths(weight: str | None) -> list[tuple[Any, Any]]:
    """For each loss the weights at the start, and those after three steps of one process with the whole batch at once."""
    found = []
    for task in TASKS:
        config = task.section(Path("runs"), 1, weight)
        model = initial(config, Path())
        start = {name: value.clone().numpy() for name, value in model.state_dict().items()}
        batches = batches_of(config, 3)
        batches = [repeated(batch) for batch in batches] if weight else batches
        found.append((start, plain_update(model, batches, task.mean, lr=LR)))
    return found


@pytest.mark.parametrize(
    ("world_size", "slots", "weight"),
    [
        pytest.param(1, 4, None, marks=ALONE), (2, 4, None), (4, 4, None), (3, 5, None),
        pytest.param(1, 4, "trust", marks=ALONE), (3, 5, "trust"),
    ],
)  # fmt: skip
def test_the_update_is_that_of_torchs_mean_over_the_whole_batch(
    pool: ProcessPool, tmp_path: Path, world_size: int, slots: int, weight: str | None
) -> None:
    configs = [task.section(tmp_path / str(number), slots, weight) for number, task in enumerate(TASKS)]
    (got, *_) = pool.run(train_all, world_size, configs)
    errors = {
        str(task): relative_difference(weights, start, expected)
        for task, weights, (start, expected) in zip(TASKS, got, truths(weight), strict=True)
    }
    assert {name: error for name, error in errors.items() if not error < TOLERANCE} == {}
