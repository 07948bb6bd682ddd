"""Restrictions of models that the processes hold together (``strategy.kind: fsdp`` and ``zero``)."""

from __future__ import annotations

from typing import Any

from runtime.config.data import BatchSection
from runtime.config.learning import ModelSection, OptimizerSection
from runtime.config.signatures import class_name
from runtime.config.strategy import CompileSection, StrategySection


def sharding_rules(
    strategy: StrategySection,
    *,
    batch: BatchSection,
    model: ModelSection,
    optimizer: OptimizerSection,
    compiled: CompileSection | None,
    batch_norm: str | None,
    precision: str,
) -> list[tuple[Any, str, str]]:
    """Return what a sharded model cannot do, as (whether it is asked for, key, message); nothing for ``kind: ddp``."""
    kind, mixed = strategy.kind, strategy.fsdp.mixed_precision
    if kind == "ddp":
        return []
    targets = [optimizer.target, *(group.target for group in optimizer.groups)]
    factored = [target for target in targets if class_name(target) == "Adafactor"]
    return [
        (
            batch.micro_size == "auto",
            "batch.micro_size",
            f"auto tries sizes on each rank independently, which does not work with kind: {kind}; give a number",
        ),
        (
            compiled is not None and not compiled.blocks,
            "compile.blocks",
            f"with strategy.kind: {kind} blocks are compiled separately: give their classes",
        ),
        (batch_norm == "sync", "batch_norm", f"sync needs strategy.kind: ddp, not {kind}"),
        (
            model.unfreeze,
            "model.unfreeze",
            f"with strategy.kind: {kind} the trained parameters are fixed at the start; use ddp, or two runs",
        ),
        (
            factored,
            "optimizer.target",
            f"Adafactor keeps sums over rows and columns, which strategy.kind: {kind} cannot shard; use AdamW, or ddp",
        ),
        (
            mixed is not None and mixed.parameters != precision,
            "strategy.fsdp.mixed_precision.parameters",
            f"must be that of precision ({precision})",
        ),
    ]
