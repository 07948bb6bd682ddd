"""``determinism: exact`` with FSDP2: its options, the order in which blocks are reduced, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from runtime.errors import ConfigurationError
from runtime.optimization.elementwise import refuse_coupled_rows
from tests.process_pool import ProcessPool, RemoteError
from tests.random_runs import random_run
from tests.test_exact import digests, figures, train_all


def plain(folder: Path, **changes: Any) -> dict[str, Any]:
    run = random_run(0, folder)
    run["model"] = {"target": "tiny_exact:Normed", "args": {"batch_norm": False}}
    run["data"] = {"train": {"target": "tiny_exact:samples"}, "validation": {"target": "tiny_exact:samples"}}
    run["batch"] = {"global_size": 20, "slots": 5}
    run |= {"objective": "CrossEntropyLoss", "evaluation": {"every": "5 steps"}, "precision": "fp32", "averaging": None}
    return {**run, "optimizer": {"target": "AdamW", "args": {"lr": 0.01}, "max_grad_norm": 0.5}, **changes}


def with_options(run: dict[str, Any], **options: Any) -> dict[str, Any]:
    precision = "bf16" if "mixed_precision" in options else "fp32"
    return {**run, "precision": precision, "strategy": {"kind": "fsdp", "fsdp": {"wrap": ["Linear"], **options}}}


OPTIONS: list[dict[str, Any]] = [
    {"no_sync": True, "reshard_after_forward": False},
    {"cpu_offload": True},
    {"mixed_precision": {"parameters": "bf16"}},
    {"mixed_precision": {"parameters": "bf16", "gradients": "bf16"}},
    {"wrap": [], "min_parameters": 200},
]


def test_options_are_the_same_bits_on_1_to_3_processes(pool: ProcessPool, tmp_path: Path) -> None:
    def runs(name: str) -> list[dict[str, Any]]:
        return [with_options(plain(tmp_path / f"{name}-{number}"), **options) for number, options in enumerate(OPTIONS)]

    ddp = pool.run(train_all, 1, [plain(tmp_path / "ddp")])[0][0]
    alone = pool.run(train_all, 1, runs("alone"))[0]
    found = {2: pool.run(train_all, 2, runs("two")[::2])[0], 3: pool.run(train_all, 3, runs("three")[1::2])[0]}
    for number, options in enumerate(OPTIONS):
        expected = alone[number]
        assert sorted(digests(expected)) == [4, 8, 12]
        if "mixed_precision" not in options:  # it rounds what autocast does not
            assert (figures(expected), digests(expected)) == (figures(ddp), digests(ddp)), options
        record = found[2 + number % 2][number // 2]
        assert (figures(record), digests(record)) == (figures(expected), digests(expected)), options


def test_a_gradient_of_negative_zero_is_the_same_with_ddp(pool: ProcessPool, tmp_path: Path) -> None:
    changes = {
        "model": {"target": "tiny_exact:NegativeZero"},
        "objective": "L1Loss",
        "evaluation": {},
        "schedule": None,
    }
    data = {"train": {"target": "tiny_exact:samples", "args": {"kind": "labels"}}}
    optimizer = {"target": "SGD", "args": {"lr": 0.01, "momentum": 0.9}}

    def run(name: str) -> dict[str, Any]:
        return plain(tmp_path / name, **changes, data=data, optimizer=optimizer, batch={"global_size": 20, "slots": 2})

    ddp = pool.run(train_all, 1, [run("ddp")])[0][0]
    fsdp = pool.run(train_all, 2, [with_options(run("fsdp"), wrap=[])])[0][0]
    assert digests(fsdp) == digests(ddp)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_block_that_is_called_twice_is_named(pool: ProcessPool, tmp_path: Path, world_size: int) -> None:
    run = plain(tmp_path / "run", model={"target": "tiny_exact:Normed", "args": {"shared": True}})
    if hasattr(FSDPModule, "set_reduce_scatter_unused_params"):  # torch 2.11 reduces once, when the gradient is whole
        with pytest.raises(
            RemoteError, match=r"hidden is called more than once in a forward pass.*strategy\.fsdp\.wrap"
        ):
            pool.run(train_all, world_size, [with_options(run)])
    pool.run(train_all, world_size, [with_options(run, wrap=[])])


class Normalised(torch.optim.Optimizer):
    """Divides each gradient by the norm of the whole parameter's."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.sub_(group["lr"] * parameter.grad / parameter.grad.norm())


class Failing(Normalised):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        raise KeyError("names")


def weights(*shape: int) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(*shape))]


@pytest.mark.single
@pytest.mark.parametrize(
    ("optimizer", "what"),
    [
        (torch.optim.Muon(weights(4, 4)), "Muon updates a row"),
        (torch.optim.Adafactor(weights(4, 4)), "Adafactor updates a row"),
        (
            torch.optim.SGD(weights(4), lr=0.1, momentum=0.9, fused=True),
            r"SGD with fused kernels .* leave optimizer\.args\.fused out",
        ),
        (torch.optim.AdamW(weights(4), lr=1e-3, fused=True), "AdamW with fused kernels"),
        (Normalised(weights(4)), "Normalised updates a row"),
        (Failing(weights(4)), "Failing cannot be tried .* KeyError"),
    ],
)
def test_an_optimizer_that_mixes_rows_is_refused(optimizer: torch.optim.Optimizer, what: str) -> None:
    with pytest.raises(ConfigurationError, match=what):
        refuse_coupled_rows(optimizer, torch.device("cpu"))


@pytest.mark.single
def test_torchs_elementwise_optimizers_are_accepted_and_left_alone() -> None:
    for name in ["SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adagrad", "Adadelta", "Adamax", "RMSprop", "ASGD", "Rprop"]:
        kind: Any = getattr(torch.optim, name)
        parameters = weights(3)
        optimizer = kind(parameters, lr=0.1, foreach=True)
        before = dict(optimizer.state)
        refuse_coupled_rows(optimizer, torch.device("cpu"))
        assert dict(optimizer.state).keys() == before.keys()
        assert torch.equal(parameters[0], torch.ones(3))
