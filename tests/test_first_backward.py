"""What the first start finds out about gradients and lone samples, by trying, and without a trace."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from runtime.errors import ConfigurationError
from tests.observed import assert_bitwise_equal, configuration, observe
from tests.process_pool import ProcessPool


def branches(folder: Path, uses: str, **changes: Any) -> dict[str, Any]:
    model = {"target": "tiny_branches:Branches", "args": {"uses": uses}}
    return configuration(folder, **{"model": model, "limit": {"steps": 2}, **changes})


NAMES = "first.weight, first.bias, second.weight, second.bias got no gradient"


@pytest.mark.single
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_parameters_without_a_gradient_are_named_on_one_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    observe(branches(tmp_path, "never", strategy={"kind": kind}))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "warning" in line and "gradient" in line]
    assert NAMES in line
    assert "model.freeze" in line
    assert ("strategy.ddp.find_unused_parameters: true" in line) == (kind == "ddp")


def refused(config: dict[str, Any]) -> str:
    try:
        observe(config)
    except ConfigurationError as error:
        return str(error)
    return "trained"


def test_on_several_processes_they_are_refused_before_the_first_step(pool: ProcessPool, tmp_path: Path) -> None:
    messages = pool.run(refused, 2, branches(tmp_path, "never"))
    assert all(NAMES in message and "strategy.ddp.find_unused_parameters" in message for message in messages)
    searched = {"ddp": {"find_unused_parameters": True}}
    assert pool.run(refused, 2, branches(tmp_path, "never", strategy=searched)) == ["trained"] * 2


def test_deepspeed_is_said_to_update_them_all_the_same(
    pool: ProcessPool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("deepspeed")
    model = {"target": "tiny_branches:Branches", "args": {"uses": "never", "dtype": "float32"}}
    changes = {
        "model": model,
        "data": {"train": {"target": "tiny:points", "args": {"dtype": "float32"}}},
        "optimizer": {"target": "AdamW", "args": {"lr": 0.01}},
        "strategy": {"kind": "zero"},
    }
    config = configuration(tmp_path, **changes, limit={"steps": 2})
    (told,) = pool.run(warnings_of, 1, config)
    assert any(NAMES in text and "as if it were zero" in text for text in told)


def warnings_of(config: dict[str, Any]) -> list[str]:
    """Train, and return what the run warned of."""
    observe(config)
    records = map(json.loads, (Path(config["output"]) / "metrics.jsonl").read_text().splitlines())
    messages = [record["text"] for record in records if record["event"] == "message"]
    return [text for text in messages if text.startswith("warning: ")]


@pytest.mark.single
def test_models_that_train_all_of_it_are_met_with_silence(tmp_path: Path) -> None:
    """Frozen parts, tied weights, several losses, dropout and BatchNorm."""
    frozen = {"target": "tiny:Mlp", "args": {}, "freeze": ["net.0.*"]}
    assert warnings_of(configuration(tmp_path / "frozen", model=frozen)) == []
    assert warnings_of(configuration(tmp_path / "plain")) == []


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.single), 2])
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_the_checks_leave_no_trace(pool: ProcessPool, tmp_path: Path, world_size: int, kind: str) -> None:
    """BatchNorm, dropout, a counter and a generator of the model's own."""
    strategy = {"kind": kind} if kind == "fsdp" else {"ddp": {"static_graph": True}}
    changes = {"optimizer": {"target": "AdamW", "args": {"lr": 0.05}}, "strategy": strategy}
    runs = {}
    for checks in ("on", "off"):
        config = configuration(tmp_path / checks, **changes, checks=checks)
        runs[checks] = pool.run(observe, world_size, config)[0]
    assert_bitwise_equal(runs["on"], runs["off"])
    assert runs["on"]["losses"] == runs["off"]["losses"]
    assert (
        pool.run(state_around_the_checks, world_size, configuration(tmp_path / "around", **changes))
        == [True] * world_size
    )


def state_around_the_checks(config: dict[str, Any]) -> bool:
    """Tell whether module, attributes, gradients, optimizer and random states are afterwards what they were."""
    from runtime.checks.first_start import check_first_start

    config["model"] = {"target": "tiny_branches:Normed", "args": {"kind": "1d"}}
    seen: list[str] = []

    def looking(start: Any) -> None:
        seen.append(_digest(start))
        check_first_start(start)
        seen.append(_digest(start))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("runtime.run.run.check_first_start", looking)
        observe(config)
    return len(seen) == 2 and seen[0] == seen[1]


def _digest(start: Any) -> str:
    state = start.prepared.state
    digest = hashlib.sha256()
    for tensor in (
        *state.module.state_dict().values(),
        torch.get_rng_state(),
        state.module.model.generator.get_state(),
    ):
        local = tensor._local_tensor if hasattr(tensor, "_local_tensor") else tensor
        digest.update(local.detach().numpy().tobytes())
    modes = [part.training for part in state.module.modules()]
    gradients = [parameter.grad is None for parameter in state.module.parameters()]
    others = (
        modes,
        gradients,
        state.module.model.calls,
        random.getstate(),
        np.random.get_state(legacy=False)["state"]["key"].tolist(),
    )
    digest.update(repr((others, len(state.optimizer.state))).encode())
    return digest.hexdigest()


@pytest.mark.single
@pytest.mark.parametrize(
    ("kind", "size", "batch", "key"),
    [
        ("1d", 17, {"global_size": 16, "slots": 2}, "data.drop_last"),
        ("1d", 35, {"global_size": 16, "slots": 2}, "data.drop_last"),
        ("2d of one element", 17, {"global_size": 16, "slots": 2}, "data.drop_last"),
        ("instance", 17, {"global_size": 16, "slots": 2}, "data.drop_last"),
        ("1d", 32, {"global_size": 16, "slots": 16}, "batch.slots"),
        ("1d", 32, {"global_size": 16, "micro_size": 1}, "batch.slots"),
    ],
)
def test_a_slot_of_one_sample_is_refused_where_a_layer_normalises_over_samples(
    tmp_path: Path, kind: str, size: int, batch: dict[str, Any], key: str
) -> None:
    with pytest.raises(ConfigurationError) as raised:
        observe(normed(tmp_path, kind, size, batch))
    assert key in str(raised.value)
    assert "norm (" in str(raised.value)  # the layer's name


@pytest.mark.single
@pytest.mark.parametrize(
    ("kind", "size", "batch", "drop_last"),
    [
        ("1d", 17, {"global_size": 16, "slots": 2}, True),
        ("1d", 36, {"global_size": 16, "slots": 2}, False),
        ("2d", 17, {"global_size": 16, "slots": 2}, False),
        ("layer", 17, {"global_size": 16, "slots": 16}, False),
    ],
)
def test_what_can_be_normalised_is_trained(
    tmp_path: Path, kind: str, size: int, batch: dict[str, Any], drop_last: bool
) -> None:
    config = normed(tmp_path, kind, size, batch)
    config["data"]["drop_last"] = drop_last
    assert observe(config)["outcome"] == "finished"


def normed(folder: Path, kind: str, size: int, batch: dict[str, Any]) -> dict[str, Any]:
    return configuration(
        folder,
        model={"target": "tiny_branches:Normed", "args": {"kind": kind}},
        data={"train": {"target": "tiny:points", "args": {"size": size}}},
        batch=batch,
        limit={"epochs": 1},
    )


@pytest.mark.single
@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"target": "tiny_branches:Lazy", "args": {}}, r"net\.0 \(LazyLinear\).*in_features"),
        ({"target": "tiny_branches:Sparse", "args": {}}, r"words.*sparse=False"),
        ({"target": "tiny_branches:Sparse", "args": {"functional": True}}, r"words\.weight.*sparse=False"),
    ],
)
def test_weights_that_cannot_be_trained_are_refused_by_name(tmp_path: Path, model: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        observe(configuration(tmp_path, model=model))
