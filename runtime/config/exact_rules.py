"""What ``determinism: exact`` cannot promise. Imports no torch."""

from __future__ import annotations

from typing import Any

from runtime.config.data import DataSection
from runtime.config.strategy import StrategySection


def exact_rules(
    determinism: str | None, strategy: StrategySection, data: DataSection, *, batch_norm: str
) -> list[tuple[Any, str, str]]:
    """Return what makes a result depend on the number of processes, as (whether it is asked for, key, message)."""
    if determinism != "exact":
        return []
    return [
        (
            strategy.kind == "zero",
            "determinism",
            "exact needs strategy.kind: ddp or fsdp: zero adds up gradients in an order that depends on the number of "
            "processes; use one of these, or determinism: strict",
        ),
        (
            strategy.ddp.communication_hook is not None,
            "strategy.ddp.communication_hook",
            "rounds what each process sends, so the result depends on their number; leave it out, or use determinism: strict",
        ),
        (
            batch_norm == "sync",
            "batch_norm",
            "sync normalises over the slots that run at the same time, whose number is that of the processes; use local, or "
            "determinism: strict",
        ),
        *(
            (
                split is not None and split.sharded_by == "dataset",
                f"data.{name}.sharded_by",
                "a data set that shards itself gives other samples to other numbers of processes; use runtime, or "
                "determinism: strict",
            )
            for name, split in (("train", data.train), ("validation", data.validation), ("test", data.test))
        ),
    ]
