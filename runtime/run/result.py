"""What came of a run, as ``train`` returns it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import nn

from runtime.build.builder import Builder
from runtime.checkpoints.load import load_weights
from runtime.evaluation.metrics import Result
from runtime.state.module_buffers import make_room
from runtime.training.stop_reason import StopReason


@dataclass(frozen=True)
class RunResult:
    """What came of a run.

    Args:
        outcome: ``finished``, or ``stopped`` when it was asked to stop and can be continued.
        step: global batches consumed in all.
        results: of the last evaluation of the validation data; ``test/…`` of the test data. Equal on every rank.
        folder: the run folder.
        make_model: returns the trained model.
        message: why it finished before its limit, if it did.
        stop_reason: why it ended; ``stop request`` is what can be continued. Equal on every rank.
    """

    outcome: Literal["finished", "stopped"]
    step: int
    results: Mapping[str, Result]
    folder: Path
    make_model: Callable[[], nn.Module]
    message: str = ""
    stop_reason: StopReason | None = None

    @functools.cached_property
    def model(self) -> nn.Module:
        """The trained model; where the processes held it together, a whole one on the CPU, of the last checkpoint."""
        return self.make_model()


def model_maker(builder: Builder, model: nn.Module, saved: Path | None) -> Callable[[], nn.Module]:
    """Return what makes a run's trained model.

    Args:
        model: as this process holds it.
        saved: the checkpoint that has all of it, where the processes hold it together.
    """
    if saved is None:
        return lambda: model

    def make() -> nn.Module:
        whole, weights = builder.model(), load_weights(saved)
        make_room(whole, "model.", weights.model, weights.buffers["made"])
        whole.load_state_dict(weights.model)
        return whole

    return make
