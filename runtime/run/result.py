"""The result of a training run, returned by ``train``."""

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
    """The result of a training run.

    Args:
        outcome: ``finished``, or ``stopped`` if it was asked to stop and can be resumed.
        step: global batches consumed in total.
        results: of the last evaluation of the validation data; ``test/…`` of the test data. Equal on every rank.
        folder: the run folder.
        make_model: returns the trained model.
        message: why it finished before its limit, if it did.
        stop_reason: why it ended; after ``stop request`` it can be resumed. Equal on every rank.
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
        """The trained model; with a sharded strategy, an unsharded one on the CPU from the last checkpoint."""
        return self.make_model()


def model_maker(builder: Builder, model: nn.Module, saved: Path | None) -> Callable[[], nn.Module]:
    """Return a function that returns a run's trained model.

    Args:
        model: this process's.
        saved: the checkpoint to load it from, if the strategy is sharded.
    """
    if saved is None:
        return lambda: model

    def make() -> nn.Module:
        unsharded, weights = builder.model(), load_weights(saved)
        make_room(unsharded, "model.", weights.model, weights.buffers["made"])
        unsharded.load_state_dict(weights.model)
        return unsharded

    return make
