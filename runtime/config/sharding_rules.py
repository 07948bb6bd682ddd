"""Restrictions of models that the processes hold together (``strategy.kind: fsdp`` and ``zero``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from runtime.config.signatures import class_name

if TYPE_CHECKING:
    from runtime.config.sections import RunConfiguration


def sharding_rules(values: RunConfiguration) -> list[tuple[Any, str, str]]:
    """Return the restrictions of a sharded model."""
    kind, mixed = values.strategy.kind, values.strategy.fsdp.mixed_precision
    if kind == "ddp":
        return []
    targets = [values.optimizer.target, *(group.target for group in values.optimizer.groups)]
    factored = [target for target in targets if class_name(target) == "Adafactor"]
    return [
        (
            values.batch.micro_size == "auto",
            "batch.micro_size",
            f"auto tries sizes on each rank independently, which does not work with kind: {kind}; give a number",
        ),
        (
            values.compile is not None and not values.compile.blocks,
            "compile.blocks",
            f"with strategy.kind: {kind} blocks are compiled separately: give their classes",
        ),
        (values.batch_norm == "sync", "batch_norm", f"sync needs strategy.kind: ddp, not {kind}"),
        (
            values.model.unfreeze,
            "model.unfreeze",
            f"with strategy.kind: {kind} the trained parameters are fixed at the start; use ddp, or two runs",
        ),
        (
            factored,
            "optimizer.target",
            f"Adafactor keeps sums over rows and columns, which strategy.kind: {kind} cannot shard; use AdamW, or ddp",
        ),
        (
            mixed is not None and mixed.parameters != values.precision,
            "strategy.fsdp.mixed_precision.parameters",
            f"must be that of precision ({values.precision})",
        ),
    ]
