"""Rules for ``strategy.kind: zero``, checked before anything starts; messages give reason and remedy. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from runtime.config.sections import RunConfiguration
from runtime.config.zero_json import contradictions, read_sources
from runtime.errors import Problem

_NOT_ELEMENTWISE = ("Muon", "Adafactor", "LBFGS")
_DDP = "or use strategy.kind: ddp"

UNUSED_PARAMETERS = (
    "DeepSpeed updates parameters without a gradient as if it were zero (weight decay, momentum): freeze what no step uses "
    "(model.freeze), or use strategy.kind: ddp"
)


def zero_problems(
    values: RunConfiguration, where: Callable[[Sequence[str]], str], beside: Callable[[str], Path]
) -> list[Problem]:
    """Return the problems of a configuration with ``strategy.kind: zero``; none for others.

    Args:
        where: returns file and line of a key of the YAML.
        beside: returns a path relative to the YAML.
    """
    if values.strategy.kind != "zero":
        return []
    broken = [Problem(where(key.split(".")), key, what) for wrong, key, what in _rules(values) if wrong]
    sources, unreadable = read_sources(values, where, beside)
    return [*broken, *unreadable, *contradictions(values, sources, where)]


def _rules(values: RunConfiguration) -> list[tuple[object, str, str]]:
    optimizer = values.optimizer
    name = optimizer.target
    return [
        (
            optimizer.max_grad_value is not None,
            "optimizer.max_grad_value",
            f"DeepSpeed clips by norm only; use max_grad_norm, {_DDP}",
        ),
        (
            any(group.target is not None for group in optimizer.groups),
            "optimizer.groups",
            f"groups with separate optimizers cannot be sharded together; use one optimizer, {_DDP}",
        ),
        (
            name in _NOT_ELEMENTWISE,
            "optimizer.target",
            f"{name} needs whole matrices, but DeepSpeed gives an optimizer flat parts of parameters; use AdamW, {_DDP}",
        ),
        (
            name == "Adagrad",
            "optimizer.target",
            "DeepSpeed rebuilds Adagrad with default arguments, so groups and schedule would have no effect; use "
            f"RMSprop or AdamW, {_DDP}",
        ),
        (
            values.batch.micro_size == "auto",
            "batch.micro_size",
            f"auto tries sizes with the unsharded model, which sharding is meant to avoid; give a number, {_DDP}",
        ),
        (
            values.averaging and _on_disk(values),
            "averaging",
            "the average is computed from the float32 weights, which offload_optimizer: nvme keeps on disk; offload to cpu",
        ),
        (
            values.compile and values.strategy.zero.stage == 3,
            "compile",
            "stage 3 gathers and frees parameters during a pass, which cannot be compiled; leave it out, or use stage 2",
        ),
    ]


def _on_disk(values: RunConfiguration) -> bool:
    offload = values.strategy.zero.offload_optimizer
    return offload is not None and offload.device == "nvme"
