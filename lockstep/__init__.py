"""The public Python API of Lockstep, for programs and users' own modules.

    import lockstep

    result = lockstep.train("configs/digits.yaml", "limit.epochs=3")
    lockstep.evaluate(result.folder, checkpoint="best:accuracy").results
    lockstep.predict(result.folder, split="validation", output="digits.csv")

Anything not exported here may be renamed or moved. Exports are imported lazily: importing this package does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lockstep import errors
    from runtime.inference.checkpoint_inference import InferenceResult
    from runtime.objective import Loss, Objective
    from runtime.reporting.tracker import TrackedRun, Tracker
    from runtime.run.result import RunResult
    from runtime.session import evaluate, predict, train
    from runtime.training.observers import StepReport
    from runtime.training.stop_reason import StopReason

_MODULES = {
    "InferenceResult": "runtime.inference.checkpoint_inference",
    "Loss": "runtime.objective",
    "Objective": "runtime.objective",
    "RunResult": "runtime.run.result",
    "StepReport": "runtime.training.observers",
    "StopReason": "runtime.training.stop_reason",
    "TrackedRun": "runtime.reporting.tracker",
    "Tracker": "runtime.reporting.tracker",
    "evaluate": "runtime.session",
    "predict": "runtime.session",
    "train": "runtime.session",
}

__all__ = [
    "InferenceResult",
    "Loss",
    "Objective",
    "RunResult",
    "StepReport",
    "StopReason",
    "TrackedRun",
    "Tracker",
    "errors",
    "evaluate",
    "predict",
    "train",
]


def __getattr__(name: str) -> Any:
    if name == "errors":
        return importlib.import_module("lockstep.errors")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return __all__
