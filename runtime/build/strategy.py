"""Builds the strategy of ``strategy.kind``."""

from __future__ import annotations

from runtime.config.file import LoadedConfiguration
from runtime.strategies import Strategy


def build_strategy(loaded: LoadedConfiguration) -> Strategy:
    """Join the process group and return the strategy. Collective: every rank must call this.

    Raises:
        torch.distributed.DistError: the rendezvous timed out after ``limit.stall_seconds``.
        ConfigurationError: the options do not fit this machine or the process group.
    """
    values = loaded.values
    if values.strategy.kind == "zero":
        from runtime.config.zero_json import generate
        from runtime.strategies.zero.strategy import ZeroStrategy

        return ZeroStrategy(
            precision=values.precision,
            generated=generate(values, loaded.where.beside),
            timeout_seconds=values.limit.stall_seconds,
        )

    if values.strategy.kind == "fsdp":
        from runtime.strategies.fsdp import FSDPStrategy

        return FSDPStrategy(
            precision=values.precision,
            section=values.strategy.fsdp,
            max_grad_value=values.optimizer.max_grad_value,
            timeout_seconds=values.limit.stall_seconds,
        )
    from runtime.strategies.ddp import DDPStrategy

    return DDPStrategy(
        precision=values.precision,
        options=values.strategy.ddp,
        max_grad_value=values.optimizer.max_grad_value,
        timeout_seconds=values.limit.stall_seconds,
    )
