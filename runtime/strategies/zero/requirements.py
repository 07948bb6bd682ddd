"""Check of a strategy's optional dependency, before processes are started."""

from __future__ import annotations

import importlib.util

from runtime.config.strategy import StrategySection
from runtime.errors import MissingDependencyError


def check_requirements(section: StrategySection) -> None:
    """Refuse a strategy whose package is missing.

    Raises:
        MissingDependencyError: ``strategy.kind: zero`` without deepspeed installed.
    """
    if section.kind == "zero" and importlib.util.find_spec("deepspeed") is None:
        raise MissingDependencyError("deepspeed", "strategy.kind: zero", "deepspeed")
