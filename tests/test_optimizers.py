"""Every optimizer of torch by name, groups, no decay, layer-wise rates, clipping, schedule-free: against torch by hand."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_value_

from runtime.build.builder import Builder
from runtime.build.components import check_components
from runtime.config.component import add_code_folder
from runtime.config.file import LoadedConfiguration, load
from runtime.errors import ConfigurationError
from runtime.objective import TrainingModule
from runtime.optimization import optimizer as optimizer_building
from tests.observed import assert_bitwise_equal, configuration, largest_difference, observe
from tests.process_pool import ProcessPool
from tests.test_resumption import observe_stopping

SIZE, BATCH, STEPS = 48, 16, 5  # three steps an epoch
OPTIMIZERS = sorted(
    name
    for name, found in vars(torch.optim).items()
    if inspect.isclass(found) and issubclass(found, torch.optim.Optimizer)
)


def whole_batches(folder: Path, optimizer: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A run whose steps are one forward pass each, over samples in their own order."""
    return configuration(
        folder,
        **{
            "model": {"target": "tiny_transfer:Plain", "args": {"layers": 1, "width": 6}},
            "data": {"train": {"target": "tiny:points", "args": {"size": SIZE}}, "shuffle": False},
            "batch": {"global_size": BATCH, "slots": 1},
            "limit": {"steps": STEPS},
            "optimizer": optimizer,
            **changes,
        },
    )


def built(config: dict[str, Any]) -> tuple[LoadedConfiguration, nn.Module]:
    """The configuration and its model as a run begins with it."""
    loaded = load(config)
    add_code_folder(loaded.code)
    return loaded, Builder(loaded).model()


def batches(config: dict[str, Any], steps: int = STEPS) -> Any:
    samples = Builder(load(config)).samples("train", batch_size=BATCH)
    assert samples is not None
    inputs, target = samples.source.tensors
    for step in range(steps):
        start = step * BATCH % SIZE
        yield inputs[start : start + BATCH], target[start : start + BATCH]


def take_gradient(model: nn.Module, batch: Any) -> None:
    for parameter in model.parameters():
        parameter.grad = None
    loss = F.cross_entropy(model(batch[0]), batch[1], reduction="sum")
    loss.backward(loss.new_full((), 1 / BATCH))


def as_observed(model: nn.Module) -> dict[str, Any]:
    return {"weights": {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, "float32") for name in OPTIMIZERS if name not in optimizer_building.EXCLUDED),
        *((name, "float64") for name in ("AdamW", "ASGD", "NAdam", "SGD")),
    ],
)
def test_every_optimizer_of_torch_is_torchs_own_through_a_stop_and_a_resume(
    pool: ProcessPool, tmp_path: Path, name: str, dtype: str
) -> None:
    kind, args = getattr(torch.optim, name), {"lr": 0.03}
    if name in ("SGD", "RMSprop"):
        args["momentum"] = 0.9
    model = "tiny_transfer:Matrices" if name == "Muon" else "tiny_transfer:Plain"
    sizes = {} if name == "Muon" else {"layers": 1, "width": 6}
    config = whole_batches(
        tmp_path,
        {"target": name, "args": args},
        model={"target": model, "args": {**sizes, "dtype": dtype}},
        data={"train": {"target": "tiny:points", "args": {"size": SIZE, "dtype": dtype}}, "shuffle": False},
    )
    _, by_hand = built(config)
    before = [parameter.detach().clone() for parameter in by_hand.parameters()]
    fused = {"fused": True} if "fused" in inspect.signature(kind).parameters else {}
    optimizer = kind(by_hand.parameters(), **args, **fused)
    for batch in batches(config):
        take_gradient(by_hand, batch)
        optimizer.step()
    assert pool.run(observe_stopping, 1, config, 2)[0]["step"] == 2
    assert_bitwise_equal(as_observed(by_hand), pool.run(observe, 1, config)[0])
    assert not any(torch.equal(old, new) for old, new in zip(before, by_hand.parameters(), strict=True))


@pytest.mark.parametrize("name", sorted(optimizer_building.EXCLUDED))
def test_what_cannot_be_used_is_refused_with_its_reason(tmp_path: Path, name: str) -> None:
    assert name in OPTIMIZERS
    reason = optimizer_building.EXCLUDED[name].split(";")[0]
    for target in (name, f"torch.optim:{name}"):
        with pytest.raises(ConfigurationError, match=f"optimizer.target: {name} {reason}"):
            check_components(load(whole_batches(tmp_path, {"target": target, "args": {"lr": 0.1}})))


MUON_AND_ADAMW = {
    "target": "Muon",
    "args": {"lr": 0.02},
    "groups": [{"match": ["*.bias", "head.*"], "target": "AdamW", "args": {"lr": 0.01, "betas": [0.8, 0.99]}}],
    "max_grad_norm": 0.5,
}


def test_two_optimizers_are_as_by_hand_through_a_schedule_clipping_and_a_resume(
    pool: ProcessPool, tmp_path: Path
) -> None:
    schedule = {"target": "StepLR", "args": {"step_size": 2, "gamma": 0.5}}
    config = whole_batches(tmp_path / "run", MUON_AND_ADAMW, schedule=schedule)
    _, by_hand = built(config)
    named = dict(by_hand.named_parameters())
    rest = [p for name, p in named.items() if name.endswith(".bias") or name.startswith("head.")]
    matrices = [p for p in named.values() if not any(p is other for other in rest)]
    muon = torch.optim.Muon(matrices, lr=0.02)
    adamw = torch.optim.AdamW(rest, lr=0.01, betas=(0.8, 0.99), fused=True)
    for step, batch in enumerate(batches(config)):
        muon.param_groups[0]["lr"], adamw.param_groups[0]["lr"] = 0.02 * 0.5 ** (step // 2), 0.01 * 0.5 ** (step // 2)
        take_gradient(by_hand, batch)
        nn.utils.clip_grad_norm_(by_hand.parameters(), 0.5)
        muon.step()
        adamw.step()
    pool.run(observe_stopping, 1, config, 3)
    resumed = pool.run(observe, 1, config)[0]
    assert largest_difference(as_observed(by_hand), resumed) < 1e-12
    whole = pool.run(observe, 1, {**config, "output": str(tmp_path / "whole")})[0]
    assert_bitwise_equal(whole, resumed)


def test_muon_names_the_parameters_that_it_does_not_take(tmp_path: Path) -> None:
    loaded, model = built(whole_batches(tmp_path, {"target": "Muon", "args": {"lr": 0.02}}))
    with pytest.raises(
        ConfigurationError, match=r"matrices only, not first.bias, body.0.bias, head.bias: .*target: AdamW"
    ):
        builder = Builder(loaded)
        builder.optimizer(TrainingModule(model, builder.objective()))


@pytest.mark.parametrize("world_size", [1, 2])
def test_clipping_by_value_is_torchs_on_the_whole_batch(pool: ProcessPool, tmp_path: Path, world_size: int) -> None:
    config = whole_batches(
        tmp_path,
        {"target": "SGD", "args": {"lr": 0.5, "momentum": 0.9}, "max_grad_value": 0.02},
        batch={"global_size": BATCH, "slots": 4},
    )
    _, by_hand = built(config)
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.5, momentum=0.9)
    clipped = []
    for batch in batches(config):
        take_gradient(by_hand, batch)
        clipped.append(sum(int((p.grad.abs() > 0.02).sum()) for p in by_hand.parameters() if p.grad is not None))
        clip_grad_value_(by_hand.parameters(), 0.02)
        optimizer.step()
    assert min(clipped) > 0
    assert largest_difference(as_observed(by_hand), pool.run(observe, world_size, config)[0]) < 1e-10


def test_clipping_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="max_grad_value: clip by norm or by value, not both"):
        load(whole_batches(tmp_path, {"target": "SGD", "max_grad_norm": 1.0, "max_grad_value": 1.0}))


def groups_of(tmp_path: Path, optimizer: dict[str, Any], **changes: Any) -> dict[str, dict[str, Any]]:
    """The optimizer's groups as torch has them: name of each parameter to its group."""
    changes.setdefault("model", {"target": "tiny_transfer:Classifier", "args": {}})
    loaded, model = built(whole_batches(tmp_path, optimizer, **changes))
    check_components(loaded)
    builder = Builder(loaded)
    made = builder.optimizer(TrainingModule(model, builder.objective()))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(p)]: group for group in made.param_groups for p in group["params"]}
    assert set(found) == set(names.values())
    assert sum(len(group["params"]) for group in made.param_groups) == len(found)
    return found


def test_a_parameter_is_in_the_first_group_that_matches(tmp_path: Path) -> None:
    groups = [
        {"match": ["*.bias", "!head.*"], "args": {"weight_decay": 0.0}},
        {"match": ["head.*"], "args": {"lr": 0.5}},
        {"match": ["*"], "args": {"lr": 0.25}},
    ]
    found = groups_of(tmp_path, {"target": "AdamW", "args": {"lr": 0.1}, "groups": groups})
    assert {
        n: (g["lr"], g["weight_decay"]) for n, g in found.items() if n.startswith(("head", "encoder.layer.0.l"))
    } == {
        "encoder.layer.0.linear.weight": (0.25, 0.01),
        "encoder.layer.0.linear.bias": (0.1, 0.0),
        "head.weight": (0.5, 0.01),
        "head.bias": (0.5, 0.01),
    }


DECAYS_OF_TRUE = {"bins.weight", "head.weight", "encoder.layer.0.linear.weight", "encoder.layer.1.linear.weight"}


@pytest.mark.parametrize(
    ("no_decay", "decayed"),
    [
        (True, DECAYS_OF_TRUE),
        ({"embeddings": True}, DECAYS_OF_TRUE - {"bins.weight"}),
        ({"match": ["head.*"]}, DECAYS_OF_TRUE - {"head.weight"}),
        (
            ["head.*", "encoder.*", "bins.*", "!encoder.layer.1.linear.*"],
            {"encoder.layer.1.linear.weight", "encoder.layer.1.linear.bias"},
        ),
    ],
)
def test_no_decay_takes_the_weight_decay_from_what_it_names(tmp_path: Path, no_decay: Any, decayed: set[str]) -> None:
    found = groups_of(tmp_path, {"target": "AdamW", "args": {"lr": 0.1, "weight_decay": 0.3}, "no_decay": no_decay})
    assert {name: group["weight_decay"] for name, group in found.items()} == {
        name: 0.3 if name in decayed else 0.0 for name in found
    }


def test_a_norm_with_matrices_of_weights_has_no_decay_and_a_groups_own_decay_stands(tmp_path: Path) -> None:
    found = groups_of(
        tmp_path,
        {
            "target": "AdamW",
            "args": {"lr": 0.1, "weight_decay": 0.3},
            "no_decay": True,
            "groups": [{"match": ["1.bias"], "args": {"weight_decay": 0.2}}],
        },
        model={"target": "tiny_transfer:picture_norms"},
    )
    assert {name: group["weight_decay"] for name, group in found.items()} == {
        "0.weight": 0.0,  # LayerNorm over (2, 3): two-dimensional
        "0.bias": 0.0,
        "1.weight": 0.3,
        "1.bias": 0.2,
    }


def test_layer_decay_multiplies_the_rate_of_its_group_at_each_step_towards_the_input(tmp_path: Path) -> None:
    section: dict[str, Any] = {
        "target": "AdamW",
        "args": {"lr": 1.0, "weight_decay": 0.3},
        "no_decay": True,
        "layer_decay": {"factor": 0.5, "layers": ["bins.*", "encoder.layer.{i}.*"]},
        "groups": [{"match": ["encoder.layer.0.norm.*"], "args": {"lr": 8.0}}],
    }
    found = groups_of(tmp_path, section)
    rates = {name: group["lr"] for name, group in found.items()}
    assert rates == {
        "bins.weight": 0.125,
        **{f"encoder.layer.0.linear.{n}": 0.25 for n in ("weight", "bias")},
        **{f"encoder.layer.0.norm.{n}": 2.0 for n in ("weight", "bias")},
        **{f"encoder.layer.1.{part}.{n}": 0.5 for part in ("linear", "norm") for n in ("weight", "bias")},
        **{f"head.{n}": 1.0 for n in ("weight", "bias")},
    }
    assert {name for name, group in found.items() if group["weight_decay"]} == DECAYS_OF_TRUE
    section["layer_decay"]["layers"].append("head.*")  # where all are listed, the last one keeps the rate
    assert {name: group["lr"] for name, group in groups_of(tmp_path, section).items()} == rates


def test_layer_numbers_are_sorted_as_numbers(tmp_path: Path) -> None:
    layers = {"factor": 0.5, "layers": ["first.*", "body.{i}.*"]}
    found = groups_of(
        tmp_path,
        {"target": "SGD", "args": {"lr": 1.0}, "layer_decay": layers},
        model={"target": "tiny_transfer:Plain", "args": {"layers": 12, "width": 2}},
    )
    assert [found[f"body.{i}.weight"]["lr"] for i in range(12)] == [0.5 ** (12 - i) for i in range(12)]
    assert found["first.weight"]["lr"] == 0.5**13


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"groups": [{"match": ["heat.*"]}]}, r"groups.0.match: no trainable .* 'heat.\*'; did you mean 'head.\*'"),
        ({"no_decay": ["*.gamma"]}, r"no_decay: no trainable parameter matches '\*.gamma'"),
        ({"no_decay": True}, "no_decay: has no effect"),
        ({"layer_decay": {"factor": 0.9, "layers": ["encoder.layers.{i}.*"]}}, r"layers.0: .*did you mean 'encoder.layer.0"),
        ({"groups": [{"match": ["*"], "target": "AdamW"}]}, "no parameter is left for SGD"),
        ({"groups": [{"match": ["head.*"], "target": "AdamX"}]}, "groups.0.target: no 'AdamX' in torch.optim; did you mean"),
        ({"groups": [{"match": ["head.*"], "target": "AdamW", "args": {"mu": 1}}]}, "groups.0.args.mu: AdamW has no argument"),
        ({"groups": [{"match": ["head.*"], "target": "LBFGS"}]}, "groups.0.target: LBFGS needs the loss"),
        ({"target": "builtins:list", "args": {}}, "optimizer.target: is a list, not a torch.optim.Optimizer"),
    ],
)  # fmt: skip
def test_mistakes_in_groups_name_the_key_and_the_near_miss(
    tmp_path: Path, section: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        groups_of(tmp_path, {"target": "SGD", "args": {"lr": 0.1}, **section})


def test_a_schedule_that_would_write_over_the_groups_rates_is_refused(tmp_path: Path) -> None:
    section = {"target": "SGD", "groups": [{"match": ["head.*"], "args": {"lr": 0.5}}]}
    with pytest.raises(ConfigurationError, match=r"schedule.args.max_lr: is one rate for all groups"):
        load(whole_batches(tmp_path, section, schedule={"target": "OneCycleLR", "args": {"max_lr": 0.1}}))
    load(whole_batches(tmp_path, section, schedule={"target": "OneCycleLR", "args": {"max_lr": [0.5, 0.1]}}))


SCHEDULE_FREE = {"target": "schedulefree:AdamWScheduleFree", "args": {"lr": 0.05, "warmup_steps": 2}}


def schedule_free(folder: Path, **changes: Any) -> dict[str, Any]:
    return whole_batches(
        folder,
        SCHEDULE_FREE,
        **{
            "data": {
                "train": {"target": "tiny:points", "args": {"size": SIZE}},
                "validation": {"target": "tiny:points", "args": {"size": 20, "split": "v"}},
                "shuffle": False,
            },
            "batch": {"global_size": BATCH, "slots": 4},
            "evaluation": {"every": "2 steps"},
            **changes,
        },
    )


@pytest.mark.parametrize("world_size", [1, 2])
def test_schedule_free_weights_are_averaged_where_they_are_evaluated_and_saved(
    pool: ProcessPool, tmp_path: Path, world_size: int
) -> None:
    import schedulefree

    config = schedule_free(tmp_path / "whole", limit={"steps": 4})
    loaded, by_hand = built(config)
    optimizer = schedulefree.AdamWScheduleFree(by_hand.parameters(), lr=0.05, warmup_steps=2)
    optimizer.train()
    for batch in batches(config, 4):
        take_gradient(by_hand, batch)
        optimizer.step()
    training = {f"model.{name}": p.detach().clone() for name, p in by_hand.named_parameters()}
    optimizer.eval()
    validation = Builder(loaded).samples("validation", batch_size=BATCH)
    assert validation is not None
    inputs, target = validation.source.tensors
    expected = F.cross_entropy(by_hand(inputs), target).item()

    whole = pool.run(observe, world_size, config)[0]
    assert largest_difference(as_observed(by_hand), whole) < 1e-10  # what the caller gets
    assert whole["results"]["loss"] == pytest.approx(expected, rel=1e-10)
    from runtime.checkpoints.load import load_state

    model, state = load_state(tmp_path / "whole" / "checkpoints" / "step-00000004")
    for name, value in by_hand.state_dict().items():
        assert torch.allclose(model[name], value, rtol=1e-10, atol=1e-12)
    for name, value in training.items():
        assert torch.allclose(state["weights"][name], value, rtol=1e-10, atol=1e-12)
    assert not torch.equal(training["model.head.weight"], model["head.weight"])


@pytest.mark.parametrize("world_size", [1, 2])
def test_schedule_free_runs_resume_bitwise_however_often_they_evaluate(
    pool: ProcessPool, tmp_path: Path, world_size: int
) -> None:
    whole = pool.run(observe, world_size, schedule_free(tmp_path / "whole"))[0]
    config = schedule_free(tmp_path / "resumed", evaluation={"every": "1 step"})
    for after in (1, 4):
        pool.run(observe_stopping, world_size, config, after)
    resumed = pool.run(observe, world_size, config)[0]
    assert_bitwise_equal(whole, resumed)
    assert resumed["losses"] == whole["losses"]


def test_schedule_free_beside_an_average_of_ours_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="averaging: AdamWScheduleFree averages the weights itself"):
        groups_of(tmp_path, SCHEDULE_FREE, averaging={"decay": 0.9})
