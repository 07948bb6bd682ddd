"""Freezing and gradual unfreezing: against torch by hand, over processes, through resumption at every step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.build.builder import Builder
from runtime.checkpoints.load import load_state
from runtime.config.file import load
from runtime.errors import ConfigurationError
from runtime.objective import TrainingModule
from tests.observed import assert_bitwise_equal, configuration, largest_difference, observe
from tests.process_pool import ProcessPool
from tests.test_optimizers import BATCH, SIZE, as_observed, batches, built, take_gradient, whole_batches
from tests.test_resumption import observe_stopping

EPOCH = 3  # steps
STAGES = [{"epoch": 2, "match": ["body.2.*", "body.1.*"]}, {"epoch": 3, "match": ["first.*"]}]
FROZEN = ["*", "!head.*"]


def thawing(folder: Path, **changes: Any) -> dict[str, Any]:
    """Three epochs: the head alone, then half of the body, then the first layer too; ``body.0`` stays frozen."""
    return configuration(
        folder,
        **{
            "model": {"target": "tiny_transfer:Plain", "args": {}, "freeze": FROZEN, "unfreeze": STAGES},
            "data": {"train": {"target": "tiny:points", "args": {"size": SIZE}}},
            "batch": {"global_size": BATCH, "slots": 6},
            "optimizer": {"target": "AdamW", "args": {"lr": 0.01}, "max_grad_norm": 0.5},
            "schedule": {"target": "CosineAnnealingLR", "args": {"T_max": 12}, "warmup_steps": 2},
            "averaging": {"decay": 0.9},
            "strategy": {"ddp": {"bucket_mb": 0.002}},
            "limit": {"epochs": 3},
            **changes,
        },
    )


def state_of(folder: Path, step: int) -> dict[str, Any]:
    (path,) = (folder / "checkpoints").glob(f"step-{step:08d}*")
    return load_state(path)[1]


def trained(config: dict[str, Any]) -> list[list[str]]:
    """Names of what is trainable, epoch by epoch."""
    loaded, model = built(config)
    builder = Builder(loaded)
    freezing = builder.freezing(TrainingModule(model, builder.objective()))
    found = []
    for epoch in range(4):
        freezing.apply(epoch)
        found.append([name for name, parameter in model.named_parameters() if parameter.requires_grad])
    return found


def test_what_is_trained_follows_from_the_epoch(tmp_path: Path) -> None:
    both = ("weight", "bias")
    head, first = [f"head.{n}" for n in both], [f"first.{n}" for n in both]
    upper = [f"body.{i}.{n}" for i in (1, 2) for n in both]
    assert trained(thawing(tmp_path)) == [head, [*upper, *head], [*first, *upper, *head], [*first, *upper, *head]]


def test_unfreezing_is_torchs_add_param_group_by_hand(pool: ProcessPool, tmp_path: Path) -> None:
    """The schedule's rate of the moment, fresh state, and no update of what is frozen."""
    config = whole_batches(
        tmp_path,
        {"target": "AdamW", "args": {"lr": 0.05, "weight_decay": 0.1}},
        model={"target": "tiny_transfer:Plain", "args": {}, "freeze": FROZEN, "unfreeze": STAGES},
        schedule={"target": "ExponentialLR", "args": {"gamma": 0.9}},
        limit={"epochs": 3},
    )
    _, by_hand = built(config)
    untouched = by_hand.body[0].weight.detach().clone()  # type: ignore[index,union-attr]
    named = dict(by_hand.named_parameters())
    stages = [["head."], ["body.1.", "body.2."], ["first."]]
    optimizer = None
    for step, batch in enumerate(batches(config, 3 * EPOCH)):
        if step % EPOCH == 0:
            new = [p for name, p in named.items() if name.startswith(tuple(stages[step // EPOCH]))]
            if optimizer is None:
                optimizer = torch.optim.AdamW(new, lr=0.05, weight_decay=0.1, fused=True)
            else:
                optimizer.add_param_group({"params": new})
        assert optimizer is not None
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * 0.9**step
        take_gradient(by_hand, batch)
        optimizer.step()
    observed = pool.run(observe, 1, config)[0]
    assert largest_difference(as_observed(by_hand), observed) < 1e-12
    assert observed["weights"]["body.0.weight"].tobytes() == untouched.numpy().tobytes()


@pytest.mark.parametrize("world_size", [2, 3])
def test_unfreezing_gives_every_number_of_processes_the_same_weights(
    pool: ProcessPool, tmp_path: Path, world_size: int
) -> None:
    alone = pool.run(observe, 1, thawing(tmp_path / "alone"))[0]
    shared = pool.run(observe, world_size, thawing(tmp_path / "shared"))
    assert largest_difference(alone, shared[0]) < 1e-10
    for rank in shared[1:]:
        assert_bitwise_equal(shared[0], rank)
    ours, theirs = (state_of(tmp_path / name, 3 * EPOCH)["averaging"]["average"] for name in ("alone", "shared"))
    for name, average in ours.items():
        assert torch.allclose(average, theirs[name], rtol=1e-10, atol=1e-12), name
    assert shared[0]["norms"] == pytest.approx(alone["norms"], rel=1e-10)


def wrappers_alive(config: dict[str, Any]) -> list[int]:
    """Train, and return how many of the earlier wrappers are alive whenever the module is wrapped."""
    import weakref

    from runtime.strategies.ddp import DDPStrategy

    wrap = DDPStrategy._wrap
    made: list[Any] = []
    alive: list[int] = []

    def noting(self: Any) -> None:
        alive.append(sum(reference() is not None for reference in made))
        wrap(self)
        made.append(weakref.ref(self._wrapped))

    DDPStrategy._wrap = noting  # type: ignore[method-assign]
    try:
        observe(config)
    finally:
        DDPStrategy._wrap = wrap  # type: ignore[method-assign]
    return alive


def test_the_wrapper_before_is_gone_when_the_module_is_wrapped_anew(pool: ProcessPool, tmp_path: Path) -> None:
    assert pool.run(wrappers_alive, 2, thawing(tmp_path)) == [[0, 0, 0]] * 2


@pytest.mark.parametrize(
    ("world_size", "stops"),
    [
        (1, (2, 4, 7)),
        (1, (3, 6)),
        (2, (3, 5)),
        (3, (4, 6)),
    ],
)
def test_a_run_resumes_bitwise_before_on_and_after_the_edge(
    pool: ProcessPool, tmp_path: Path, world_size: int, stops: tuple[int, ...]
) -> None:
    changes: dict[str, Any] = {"model": {**thawing(tmp_path)["model"], "args": {"dropout": 0.1, "dtype": "float32"}}}
    changes["data"] = {"train": {"target": "tiny:points", "args": {"size": SIZE, "dtype": "float32"}}}
    whole = pool.run(observe, world_size, thawing(tmp_path / "whole", **changes))[0]
    config = thawing(tmp_path / "resumed", **changes)
    for after in stops:
        assert pool.run(observe_stopping, world_size, config, after)[0]["step"] == after
    resumed = pool.run(observe, world_size, config)[0]
    assert_bitwise_equal(whole, resumed)
    assert resumed["losses"] == whole["losses"]
    for name, average in state_of(tmp_path / "whole", 3 * EPOCH)["averaging"]["average"].items():
        assert torch.equal(average, state_of(tmp_path / "resumed", 3 * EPOCH)["averaging"]["average"][name]), name


def test_what_is_frozen_has_no_optimizer_state(pool: ProcessPool, tmp_path: Path) -> None:
    config = thawing(tmp_path, checkpoint={"every": "1 epoch", "keep": 9})
    pool.run(observe, 1, config)
    sizes = [len(state_of(tmp_path, step)["optimizer"]["state"]) for step in (EPOCH, 2 * EPOCH, 3 * EPOCH)]
    assert sizes == [2, 6, 8]
    newest = state_of(tmp_path, 3 * EPOCH)["optimizer"]["state"]
    assert sorted(int(state["step"]) for state in newest.values()) == [EPOCH] * 2 + [2 * EPOCH] * 4 + [3 * EPOCH] * 2


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_rollback_over_the_edge_freezes_again(pool: ProcessPool, tmp_path: Path, world_size: int) -> None:
    """The second epoch begins with a batch that leads astray; the checkpoint before lies in the first epoch."""
    config = thawing(
        tmp_path,
        objective="tiny_transfer:AstrayOnce",
        divergence={"non_finite": "rollback"},
        checkpoint={"every": "2 steps", "keep": 9},
    )
    observed = pool.run(observe, world_size, config)[0]
    assert observed["step"] == 3 * EPOCH - 1  # the batch is left out
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    told = [record["text"] for record in records if "are trained" in record.get("text", "")]
    assert [text.split(":")[0] for text in told] == ["epoch 2", "epoch 1", "epoch 2", "epoch 3"]
    state = state_of(tmp_path, 3 * EPOCH - 1)["optimizer"]["state"]
    steps = sorted(int(entry["step"]) for entry in state.values())
    assert steps == [EPOCH] * 2 + [2 * EPOCH - 1] * 4 + [3 * EPOCH - 1] * 2


def normed(folder: Path, **model: Any) -> dict[str, Any]:
    return thawing(
        folder,
        model={"target": "tiny_transfer:Classifier", "args": {"dropout": 0.2}, "freeze": ["encoder.*"], **model},
        batch={"global_size": BATCH, "slots": 4},
        limit={"epochs": 2},
    )


NEVER_TRAINED = "encoder.layer.0.norm"


@pytest.mark.parametrize("world_size", [1, 2])
def test_frozen_batch_norm_stands_still_until_it_is_unfrozen(
    pool: ProcessPool, tmp_path: Path, world_size: int
) -> None:
    unfreeze = [{"epoch": 2, "match": ["encoder.layer.1.*"]}]
    observed = pool.run(observe, world_size, normed(tmp_path / "eval", unfreeze=unfreeze))[0]["weights"]
    assert observed[f"{NEVER_TRAINED}.num_batches_tracked"] == 0
    assert (observed[f"{NEVER_TRAINED}.running_mean"] == 0).all()
    assert observed["encoder.layer.1.norm.num_batches_tracked"] == EPOCH
    moving = pool.run(observe, world_size, normed(tmp_path / "train", frozen_mode="train"))[0]["weights"]
    assert moving[f"{NEVER_TRAINED}.num_batches_tracked"] == 2 * EPOCH
    assert (moving[f"{NEVER_TRAINED}.running_mean"] != 0).all()


def test_modules_that_are_wholly_frozen_are_in_evaluation_mode_and_no_others(tmp_path: Path) -> None:
    loaded, model = built(normed(tmp_path, freeze=["encoder.layer.0.*", "encoder.layer.1.norm.*", "bins.*"]))
    builder = Builder(loaded)
    module = TrainingModule(model, builder.objective())
    freezing = builder.freezing(module)
    freezing.apply(0)
    module.eval()
    module.train()
    in_eval = {name for name, part in model.named_modules() if not part.training}
    first = {f"encoder.layer.0{part}" for part in ("", ".linear", ".norm", ".dropout")}
    assert in_eval == {*first, "encoder.layer.1.norm", "bins"}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"freeze": ["hed.*"]}, r"model.freeze: no trainable parameter matches 'hed.\*'; did you mean 'head.\*'"),
        ({"freeze": ["*"]}, "model.freeze: leaves no parameter to train in the first epoch"),
        ({"unfreeze": STAGES}, "model.unfreeze: does nothing without model.freeze"),
        ({"frozen_mode": "train"}, "model.frozen_mode: does nothing without model.freeze"),
        ({"freeze": ["first.*"], "unfreeze": STAGES}, r"unfreeze.0.match: no parameter frozen by model.freeze .* 'body.2.\*'"),
        ({"freeze": ["first.*"], "unfreeze": [{"epoch": 1, "match": ["*"]}]}, "unfreeze.0.epoch: must be greater than"),
    ],
)  # fmt: skip
def test_mistakes_name_the_key(tmp_path: Path, section: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        trained(thawing(tmp_path, model={"target": "tiny_transfer:Plain", "args": {}, **section}))


def test_a_group_of_what_is_never_trained_is_a_mistake(tmp_path: Path) -> None:
    section = {"target": "SGD", "groups": [{"match": ["body.0.*"], "args": {"lr": 0.1}}]}
    with pytest.raises(ConfigurationError, match=r"groups.0.match: no trainable parameter matches 'body.0.\*'"):
        observe(thawing(tmp_path, optimizer=section))
    load(thawing(tmp_path, optimizer=section))
