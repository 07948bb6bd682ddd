"""Whether ZeRO can be started at all, judged before there are processes."""

from __future__ import annotations

import importlib.util

from runtime.config.strategy import StrategySection
from runtime.errors import MissingDependencyError


def check_start(section: StrategySection) -> None:
    """Refuse a start that could not do what the configuration says.

    Raises:
        MissingDependencyError: deepspeed is asked for and not installed.
    """
    if section.kind == "zero" and importlib.util.find_spec("deepspeed") is None:
        raise MissingDependencyError("deepspeed", "strategy.kind: zero", "deepspeed")
