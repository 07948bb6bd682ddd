"""The one place where the configuration's ``strategy.kind`` becomes a strategy: a row for each kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from runtime.config.file import LoadedConfiguration
from runtime.strategies import Strategy


def build_strategy(loaded: LoadedConfiguration) -> Strategy:
    """Join the process group and return the strategy. Collective: every rank must call this.

    Raises:
        torch.distributed.DistError: the rendezvous timed out after ``limit.stall_seconds``.
        ConfigurationError: the options do not fit this machine or the process group.
    """
    return _STRATEGIES[loaded.values.strategy.kind](loaded)


# Each function imports its own strategy: packages of the others may be missing, and imports take time.


def _ddp(loaded: LoadedConfiguration) -> Strategy:
    from runtime.strategies.ddp import DDPStrategy
    from runtime.strategies.exact_ddp import ExactDDPStrategy

    values = loaded.values
    kind = ExactDDPStrategy if values.determinism == "exact" else DDPStrategy
    return kind(
        precision=values.precision,
        options=values.strategy.ddp,
        max_grad_value=values.optimizer.max_grad_value,
        timeout_seconds=values.limit.stall_seconds,
    )


def _fsdp(loaded: LoadedConfiguration) -> Strategy:
    from runtime.strategies.exact_fsdp import ExactFSDPStrategy
    from runtime.strategies.fsdp import FSDPStrategy

    values = loaded.values
    kind = ExactFSDPStrategy if values.determinism == "exact" else FSDPStrategy
    return kind(
        precision=values.precision,
        section=values.strategy.fsdp,
        max_grad_value=values.optimizer.max_grad_value,
        timeout_seconds=values.limit.stall_seconds,
    )


def _zero(loaded: LoadedConfiguration) -> Strategy:
    from runtime.config.zero_json import generate
    from runtime.strategies.zero.strategy import ZeroStrategy

    values = loaded.values
    return ZeroStrategy(
        precision=values.precision,
        generated=generate(values, loaded.where.beside),
        timeout_seconds=values.limit.stall_seconds,
    )


_STRATEGIES: Mapping[str, Callable[[LoadedConfiguration], Strategy]] = {"ddp": _ddp, "fsdp": _fsdp, "zero": _zero}
