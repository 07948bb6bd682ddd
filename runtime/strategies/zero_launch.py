"""Whether ZeRO can be started at all, judged before there are processes: the package, and what the launcher was told."""

from __future__ import annotations

import importlib.util
import os

from runtime.config.file import LoadedConfiguration
from runtime.errors import ConfigurationError, MissingDependencyError

_TOLD = "ACCELERATE_USE_DEEPSPEED"
_FIELDS = "ACCELERATE_CONFIG_DS_FIELDS"
_STAGE = "ACCELERATE_DEEPSPEED_ZERO_STAGE"


def check_start(loaded: LoadedConfiguration) -> None:
    """Refuse a start that could not do what the configuration says.

    Raises:
        MissingDependencyError: deepspeed is asked for and not installed.
        ConfigurationError: the launcher was told something else.
    """
    strategy = loaded.values.strategy
    told = os.environ.get(_TOLD, "").lower() in ("1", "true", "yes")
    if strategy.kind != "zero":
        if told:
            what = (
                f"is {strategy.kind}, and `accelerate launch` was told to use DeepSpeed ({_TOLD}): say strategy.kind: zero, or "
                "use another configuration file of Accelerate's"
            )
            raise ConfigurationError([loaded.problem(("strategy", "kind"), what)])
        return
    if importlib.util.find_spec("deepspeed") is None:
        raise MissingDependencyError("deepspeed", "strategy.kind: zero", "deepspeed")
    stage = os.environ.get(_STAGE)
    if "zero_stage" in os.environ.get(_FIELDS, "") and stage != str(strategy.zero.stage):
        what = f"is {strategy.zero.stage}, and the configuration file of `accelerate launch` says {stage}: take it out there"
        raise ConfigurationError([loaded.problem(("strategy", "zero", "stage"), what)])
