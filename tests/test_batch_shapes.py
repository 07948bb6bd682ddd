"""Batches of any shape: what the YAML says about their parts is enough for models in the manner of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from runtime.errors import ConfigurationError, ObjectiveError
from runtime.strategies.placement import moved as moved_to
from tests.observed import configuration, observe
from tests.process_pool import ProcessPool
from tests.test_accumulation import TOLERANCE, batches_of, initial, plain_update, relative_difference

ALONE = pytest.mark.single


def run_of(folder: Path, **changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "optimizer": {"target": "SGD", "args": {"lr": 0.2}},
        "batch": {"global_size": 16, "slots": 4},
        "limit": {"steps": 3},
    }
    return configuration(folder, **(base | changes))


def assert_equals_plain_torch(pool: ProcessPool, world_size: int, config: dict[str, Any], truth: Any) -> dict[str, Any]:
    model = initial(config, Path())
    start = {name: value.clone().numpy() for name, value in model.state_dict().items()}
    expected = plain_update(model, batches_of(config, 3), truth, lr=0.2)
    run: dict[str, Any] = pool.run(observe, world_size, config)[0]
    weights = {name: value for name, value in run["weights"].items() if name in expected}
    assert relative_difference(weights, start, expected) < TOLERANCE
    return run


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=ALONE), 3])
def test_a_transformers_classifier_trains_from_the_yaml_alone(
    pool: ProcessPool, tmp_path: Path, world_size: int
) -> None:
    config = run_of(
        tmp_path,
        model={"target": "tiny_tasks:Bert", "output": "logits"},
        data={
            "train": "tiny_tasks:sentences",
            "fields": {"inputs": ["input_ids", "attention_mask", "token_type_ids"], "target": "label"},
        },
        objective="CrossEntropyLoss",
    )

    def truth(model: Any, b: Any) -> Tensor:
        returned = model(b["input_ids"], attention_mask=b["attention_mask"], token_type_ids=b["token_type_ids"])
        return F.cross_entropy(returned.logits, b["label"])

    assert_equals_plain_torch(pool, world_size, config, truth)


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=ALONE), 2])
def test_a_transformers_language_model_trains_on_its_own_input(
    pool: ProcessPool, tmp_path: Path, world_size: int
) -> None:
    config = run_of(
        tmp_path,
        model={"target": "tiny_tasks:Causal", "args": {"num_labels": 20}, "output": "logits"},
        data={
            "train": "tiny_tasks:sentences",
            "fields": {"inputs": {"input_ids": "inputs", "attention_mask": "attention_mask"}, "target": "labels"},
        },
        objective={"target": "NextTokenLoss", "args": {"shift": True}},
        # its second embedding takes no part
        strategy={"ddp": {"find_unused_parameters": True}},
    )

    def truth(model: Any, b: Any) -> Tensor:
        logits = model(b["input_ids"], attention_mask=b["attention_mask"]).logits
        return F.cross_entropy(logits[:, :-1].reshape(-1, 20), b["labels"][:, 1:].reshape(-1))

    assert_equals_plain_torch(pool, world_size, config, truth)


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=ALONE), 3])
def test_several_losses_are_a_section_of_the_yaml(pool: ProcessPool, tmp_path: Path, world_size: int) -> None:
    data = {"target": "tiny_tasks:rows", "args": {}}
    config = run_of(
        tmp_path,
        model="tiny_tasks:TwoTasks",
        data={"train": data, "validation": data, "fields": {"inputs": "inputs"}},
        objective={
            "losses": {
                "kind": {"target": "CrossEntropyLoss", "weight": 0.3, "output": "label", "fields": {"target": "label"}},
                "size": {
                    "target": "HuberLoss",
                    "args": {"delta": 0.5},
                    "weight": 2,
                    "output": "size",
                    "fields": {"target": "real", "weight": "trust"},
                },
            }
        },
        divergence={"spike": {"sigma": 50}},
        reporting={"every": "3 steps", "progress": False},
    )

    def parts(model: Any, b: Any) -> tuple[Tensor, Tensor]:
        kind, repeated = model(b["inputs"])["label"], b["trust"]
        size = model(b["inputs"].repeat_interleave(repeated, 0))["size"]
        wanted = b["real"].repeat_interleave(repeated, 0)
        return F.cross_entropy(kind, b["label"]), F.huber_loss(size, wanted, delta=0.5)

    def truth(model: Any, b: Any) -> Tensor:
        kind, size = parts(model, b)
        return 0.3 * kind + 2 * size

    run = assert_equals_plain_torch(pool, world_size, config, truth)
    # The report is over all samples since the last one, and so is the evaluation: sums over sums, loss by loss.
    model = initial(config, Path())
    model.load_state_dict({name: torch.from_numpy(value) for name, value in run["weights"].items()}, strict=False)
    everything = batches_of({**config, "batch": {"global_size": 40, "slots": 4}}, 1)[0]
    kind, size = parts(model, everything)
    assert run["results"]["kind"] == pytest.approx(kind.item(), rel=1e-12)
    assert run["results"]["size"] == pytest.approx(size.item(), rel=1e-12)
    assert run["results"]["loss"] == pytest.approx((0.3 * kind + 2 * size).item(), rel=1e-12)
    assert run["losses"][3] is not None


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=ALONE), 2])
def test_pairs_are_ranked_from_the_yaml_alone(pool: ProcessPool, tmp_path: Path, world_size: int) -> None:
    config = run_of(
        tmp_path, model="tiny_tasks:Factors", data={"train": "tiny_tasks:rows"}, objective={"target": "BPRLoss"}
    )

    def truth(model: Any, b: Any) -> Tensor:
        better = model(b["user"], b["positive"]).unsqueeze(1)
        worse = torch.stack([model(b["user"], item) for item in b["negative"].unbind(1)], 1)
        return -F.logsigmoid(better - worse).mean()

    assert_equals_plain_torch(pool, world_size, config, truth)


@pytest.mark.single
def test_nested_tensors_move_as_they_are() -> None:
    batch = {"a": [torch.ones(2), {"b": (torch.zeros(1), "text", 3)}], "c": None}
    moved = moved_to(batch, torch.device("meta"))
    assert moved["a"][0].device.type == moved["a"][1]["b"][0].device.type == "meta"
    assert moved["a"][1]["b"][1:] == ("text", 3)
    assert moved["c"] is None


BASE: dict[str, Any] = {"model": "tiny_tasks:TwoTasks", "data": {"train": "tiny_tasks:rows"}}
PART = {"target": "MSELoss"}
WRONG: list[Any] = [
    ({"objective": {}}, "objective.target", "needs a target, or several losses"),
    ({"objective": {"target": "MSELoss", "losses": {"a": PART}}}, "objective.losses", "replaces 'target'"),
    ({"objective": {"losses": {"loss": PART}}}, "objective.losses.loss", "is not a name"),
    ({"objective": {"losses": {"a/b": PART}}}, "objective.losses.a/b", "is not a name"),
    ({"objective": {"losses": {"a": {"target": "MSELos"}}}}, "objective.losses.a.target", "did you mean 'MSELoss'"),
    ({"objective": {"losses": {"a": PART | {"args": {"beta": 1}}}}}, "objective.losses.a.args.beta", "has no argument"),
    (
        {"objective": {"losses": {"a": PART | {"weight": -1}}}},
        "objective.losses.a.weight",
        "greater than or equal to 0",
    ),
    ({"objective": {"losses": {"a": PART | {"fields": {"inputs": 0}}}}}, "objective.losses.a.fields.inputs", ""),
    ({"objective": "NLLLoss2d"}, "objective.target", "use that"),
    ({"objective": "AdaptiveLogSoftmaxWithLoss"}, "objective.target", "put it into the model"),
    ({"objective": {"target": "MSELoss", "args": {"reduction": "sum"}}}, "objective.target", "leave it out"),
    ({"objective": {"target": "FocalLoss", "args": {"gamma": -1}}}, "objective", "must not be negative"),
    ({"objective": {"losses": {"a": {"target": "Linear"}}}}, "objective.losses.a.target", "is not a loss of torch"),
    (
        {"objective": "tiny:PairObjective", "data": {"train": "tiny_tasks:rows", "fields": {"weight": "trust"}}},
        "data.fields.weight",
        "tiny:PairObjective does not read it",
    ),
    (
        {"objective": {"losses": {"a": {"target": "tiny:PairObjective", "fields": {"weight": "trust"}}}}},
        "objective.losses.a.fields.weight",
        "reads_sample_weights = True",
    ),
    (
        {
            "objective": {"losses": {"a": PART}},
            "evaluation": {"metrics": {"a": "MeanSquaredError"}},
        },
        "evaluation.metrics.a",
        "choose another name",
    ),
]


@pytest.mark.single
@pytest.mark.parametrize(("changes", "key", "words"), WRONG)
def test_mistakes_are_told_with_their_key(tmp_path: Path, changes: dict[str, Any], key: str, words: str) -> None:
    from runtime.build.builder import Builder
    from runtime.build.components import check_components
    from runtime.config.file import load

    with pytest.raises(ConfigurationError) as raised:
        loaded = load(configuration(tmp_path, **(BASE | changes)))
        check_components(loaded)
        Builder(loaded).objective()
    problems = {problem.key: problem.what for problem in raised.value.problems}
    assert key in problems, problems
    assert words in problems[key]


@pytest.mark.single
def test_a_part_that_the_batch_has_not_is_named(tmp_path: Path) -> None:
    config = run_of(
        tmp_path, **BASE, objective={"losses": {"a": PART | {"output": "size", "fields": {"target": "nix"}}}}
    )
    config["data"]["fields"] = {"inputs": "inputs"}
    with pytest.raises(ObjectiveError, match="the batch has no 'nix'"):
        observe(config)


@pytest.mark.single
def test_show_says_what_each_loss_is_divided_by(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from runtime.commands.dry_run import show
    from runtime.config.file import load

    losses = {
        "kind": {"target": "CrossEntropyLoss", "weight": 0.3, "output": "label", "fields": {"target": "label"}},
        "own": {"target": "tiny_tasks:Contrastive"},
    }
    config = run_of(tmp_path, **BASE, objective={"losses": losses})
    show(load(config), 1)
    told = " ".join(capsys.readouterr().out.split())
    assert "0.3 x kind (CrossEntropyLoss): the sum over the global batch / its targets" in told
    assert "1 x own (tiny_tasks:Contrastive): the sum over the global batch / its samples" in told
    assert "own couples the samples of a slot, so the result depends on K" in told
    config = run_of(tmp_path, **BASE, objective="MSELoss")
    config["data"] = {"train": "tiny_tasks:rows", "fields": {"inputs": "inputs", "target": "real", "weight": "trust"}}
    show(load(config), 1)
    told = " ".join(capsys.readouterr().out.split())
    assert "MSELoss: the sum over the global batch / its elements, each counting its weight" in told
    assert "couples" not in told
